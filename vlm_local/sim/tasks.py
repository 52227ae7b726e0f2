"""All tasks by name."""

from vlm_local.errors import ConfigError, suggest
from vlm_local.sim.block_tasks import Lift, Push, Reach, ReachRelation
from vlm_local.sim.drawer_tasks import CloseDrawer, OpenDrawer
from vlm_local.sim.memory_tasks import PutBack, ReachShown
from vlm_local.sim.sink_tasks import EggplantToBasket, EggplantToSink
from vlm_local.sim.task import Task

AUTOEVAL_STEPS = 70  # AutoEval's limit of control steps; success within it is reported beside that of other limits

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Reach, OpenDrawer, CloseDrawer, EggplantToBasket, EggplantToSink, Push, Lift, ReachRelation)
}
# Apart from the others: "all" does not mean them.
MEMORY_TASKS: dict[str, type[Task]] = {task.name: task for task in (ReachShown, PutBack)}


def find_task(name: str) -> type[Task]:
    known = {**TASKS, **MEMORY_TASKS}
    if name not in known:
        raise ConfigError(f"task must be one of {', '.join(known)}, not {name!r}{suggest(name, known)}")
    return known[name]
