"""Between a robot's own numbers and the Bridge frame, in which prompts, labels and phrases live.

An AutoEval station measures rotations in the base frame, adds the angles of an action to those it was last
*commanded*, and sends the *measured* ones, which after every reset lie on the other side of vertical. So an episode
keeps a shadow of the commanded angles. See docs/autoeval.md for the law and an example.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlm_local.embodiments import AUTO, AUTOEVAL, BRIDGE, Embodiment, load_embodiment, looks_like_station
from vlm_local.embodiments.rotations import (
    base_to_bridge,
    bridge_to_matrix,
    euler_to_matrix,
    find_nearest_euler,
    matrix_to_euler,
    measure_turn,
)

FAR_RAD = 0.35  # between shadow and measured pose: beyond it the shadow is wrong
_AT_RESET_RAD, _AT_RESET_M = 0.1, 0.06  # an arm this near to its reset pose was sent there; it sags by a third of that
_NUM_KEPT = 8  # last steps that may have been dropped
_MAX_CUTS = 20
_REVERSED = -0.5  # what the station executes of an action while a motor's effort is too high

AT_RESET, AT_MEASURED = "reset", "measured"


@dataclass(frozen=True, eq=False)
class Sent:
    """An action as the robot is told it.

    action: float64 (7,), what is encoded. meant: float64 (7,), the same step in the Bridge frame. frame: "autoeval"
    where rotations are converted, else "bridge". shadow: what was reckoned with, JSON values only; None for "bridge".
    """

    action: np.ndarray
    meant: np.ndarray
    frame: str
    shadow: dict | None = None


class CommandedAngles:
    """Shadow of the roll, pitch, yaw that a station was last commanded, in one episode."""

    def __init__(self, embodiment: Embodiment, max_turn_rad: float, was_reset: bool):
        """embodiment: one whose rotation_frame is "base". max_turn_rad: between commanded and target pose.

        was_reset: see `begin`.
        """
        self._reset_pose = np.array(embodiment.reset_pose)
        self._max_sent_rad = np.inf if embodiment.max_rotation_rad is None else embodiment.max_rotation_rad
        self._max_turn_rad = max_turn_rad
        self._angles: np.ndarray | None = None  # None where nothing is known of them
        self._past: list[tuple[np.ndarray, np.ndarray]] = []  # (commanded before, sent) of the last steps
        self._about: dict = {}
        self.begin(was_reset)

    def begin(self, was_reset: bool) -> None:
        """An episode begins. was_reset: the client said so, as a station does with its arm at the reset pose.

        Without that word the angles stay, unless the next measured pose is the reset pose.
        """
        self._is_new, self._was_reset = True, was_reset
        if was_reset:
            self._angles = None

    def observe(self, position: np.ndarray | None, measured: np.ndarray | None) -> None:
        """Compare the shadow with a measured pose, (3,) m and (3,) rad in the base frame, None where none came."""
        hypothesis, note, off_rad = "executed", None, None
        if self._angles is None or (self._is_new and self._is_at_reset(position, measured)):
            hypothesis = self._start(position, measured)
            note = None if self._angles is not None else "the robot sent no pose and was not reset: no rotation is sent"
        self._is_new = False
        if measured is not None and self._angles is not None:  # `_start` has set them to a measured pose
            off_rad = _measure(self._angles, measured)
            if off_rad > FAR_RAD:
                hypothesis, angles = min(self._suppose(), key=lambda each: _measure(each[1], measured))
                if self._is_at_reset(position, measured):
                    hypothesis, angles = AT_RESET, self._reset_pose[3:]
                if _measure(angles, measured) <= FAR_RAD:
                    self._angles = angles
                    self._past.clear()
                else:
                    hypothesis = self._start(position, measured)
                    note = f"the shadow was {off_rad:.2f} rad off and begins anew: no rotation is sent"
        self._about = {"hypothesis": hypothesis, "off_rad": off_rad, "measured": measured, "note": note}

    def _start(self, position: np.ndarray | None, measured: np.ndarray | None) -> str:
        self._past.clear()
        if measured is None:
            self._angles = self._reset_pose[3:] if self._was_reset else None
            return "unmeasured"
        is_at_reset = self._is_at_reset(position, measured)
        self._angles = self._reset_pose[3:] if is_at_reset else measured
        return AT_RESET if is_at_reset else AT_MEASURED

    def _is_at_reset(self, position: np.ndarray | None, measured: np.ndarray | None) -> bool:
        if measured is None:
            return False
        off_m = np.linalg.norm(position - self._reset_pose[:3])
        return bool(off_m <= _AT_RESET_M and _measure(self._reset_pose[3:], measured) <= _AT_RESET_RAD)

    def _suppose(self) -> Iterator[tuple[str, np.ndarray]]:
        """What may have happened to the last steps, and the commanded angles after it."""
        for index in range(len(self._past)):
            reversed_ = dropped = self._past[index][0]
            for _, sent in self._past[index:]:
                reversed_ = _add(reversed_, _REVERSED * sent)
            yield "dropped", dropped
            yield "reversed", reversed_
        yield AT_RESET, self._reset_pose[3:]

    def convert(self, meant: np.ndarray) -> tuple[np.ndarray, dict]:
        """Angles meant in the Bridge frame (3,) -> angles to send (3,), and the shadow for the record.

        Called after `observe`, and only where the answer is sent: the shadow moves on.
        """
        about = {"commanded": self._angles, **self._about}
        if about["note"] is not None or self._angles is None or not meant.any():
            sent = np.zeros(3)
        else:
            sent, note = self._solve(self._angles, meant)
            about["note"] = note
        if self._angles is not None:
            self._past = [*self._past[-_NUM_KEPT + 1 :], (self._angles, sent)]
            self._angles = _add(self._angles, sent)
        return sent, {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in about.items()}

    def _solve(self, angles: np.ndarray, meant: np.ndarray) -> tuple[np.ndarray, str | None]:
        """The change of the commanded `angles` (3,) that turns the gripper as meant, and what was cut."""
        before, bridge, note = euler_to_matrix(angles), base_to_bridge(angles), None
        for _ in range(_MAX_CUTS):
            target = bridge_to_matrix(bridge + meant)
            turn = measure_turn(before, target)
            if turn <= self._max_turn_rad:
                break
            note = f"the turn is cut to {self._max_turn_rad:g} rad"
            meant = meant * min(self._max_turn_rad / turn, 1 - 1e-6)
        else:
            return np.zeros(3), f"the turn cannot be cut to {self._max_turn_rad:g} rad: no rotation is sent"
        sent = find_nearest_euler(target, angles) - angles
        if np.abs(sent).max() > self._max_sent_rad:
            return np.zeros(3), f"the station would cut an angle of {np.abs(sent).max():.2f} rad: no rotation is sent"
        return sent, note


def _add(angles: np.ndarray, sent: np.ndarray) -> np.ndarray:
    """As the station adds: the sum is made a matrix, and read from it again."""
    return matrix_to_euler(euler_to_matrix(angles + sent))


def _measure(angles: np.ndarray, measured: np.ndarray) -> float:
    return measure_turn(euler_to_matrix(angles), euler_to_matrix(measured))


def measure_opening(embodiment: Embodiment, readings: np.ndarray, num_values: int) -> np.ndarray:
    """Readings of the gripper in states of so many values -> 0 closed..1 open."""
    closed, opened = embodiment.gripper_reading[str(num_values)]
    return np.clip((readings - closed) / (opened - closed), 0.0, 1.0)


class Frame:
    """One robot's numbers -> the Bridge frame, and back. Not thread-safe; each request calls `read`, then `send`."""

    def __init__(self, embodiment: str = AUTO, max_turn_rad: float = np.inf):
        """embodiment: a name, a file, or AUTO, which converts only where it is safe to believe that it must.

        max_turn_rad: largest turn between two commanded poses. Raises ConfigError.
        """
        self._max_turn_rad = max_turn_rad
        self._is_auto = embodiment == AUTO
        self._is_judged = not self._is_auto
        self._was_reset = False
        self._plain = load_embodiment(BRIDGE if self._is_auto else embodiment)
        self._station = load_embodiment(AUTOEVAL) if self._is_auto else self._plain
        self._shadow: CommandedAngles | None = None
        self._choose(self._plain)

    def begin(self, was_reset: bool) -> None:
        """An episode begins. was_reset: the client said so; else it was told from what the client sent."""
        self._was_reset = was_reset
        self._is_judged = not self._is_auto
        if self._shadow is not None:
            self._shadow.begin(was_reset)

    def read(self, state: np.ndarray | None) -> np.ndarray | None:
        """State as sent, float64 (7,) or (8,) -> float64 (7,) as types.Observation.proprio."""
        if state is not None and self._is_auto:
            is_odd = not (len(state) == 8 and state[6] == 0)  # no station sends such a state, whatever came before
            if is_odd or not self._is_judged:
                self._choose(self._station if looks_like_station(state) else self._plain)
                self._is_judged = True
        if self._shadow is not None:
            self._shadow.observe(*((None, None) if state is None else (state[:3], state[3:6])))
        if state is None:
            return None
        angles = state[3:6] if self._shadow is None else base_to_bridge(state[3:6])
        opening = measure_opening(self._embodiment, state[-1], len(state))
        return np.concatenate([state[:3], angles, [opening]])

    def send(self, meant: np.ndarray) -> Sent:
        """Action in the Bridge frame (7,) as types.Decision.action -> what the robot is told."""
        action, shadow = meant.copy(), None
        if self._shadow is not None:
            action[3:6], shadow = self._shadow.convert(meant[3:6])
        if (units := self._embodiment.action_units) is not None:
            action[:6] /= np.repeat([units["m"], units["rad"]], 3)
        closed, opened = (self._embodiment.gripper_command[state] for state in ("closed", "open"))
        action[6] = closed + (opened - closed) * meant[6]
        return Sent(action, meant, "bridge" if self._shadow is None else "autoeval", shadow)

    def send_again(self, meant: np.ndarray) -> Sent:
        """As `send`, for one more step, before which nothing was measured."""
        if self._shadow is not None:
            self._shadow.observe(None, None)
        return self.send(meant)

    def _choose(self, embodiment: Embodiment) -> None:
        if self._shadow is not None and embodiment is self._embodiment:
            return  # the same station goes on, and so does the shadow
        self._embodiment = embodiment
        self._shadow = None
        if embodiment.rotation_frame == "base":
            self._shadow = CommandedAngles(embodiment, self._max_turn_rad, self._was_reset)
