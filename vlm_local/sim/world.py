"""One scene and its physics, in the words of tasks and oracle: places, opening, touching."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import mujoco
import numpy as np

from vlm_local.sim.arm import PHYSICS_STEP_S, ArmController, measure_proprio
from vlm_local.sim.furniture import PARKING_M
from vlm_local.sim.scene import build_scene

_SETTLE_STEPS = 50  # physics steps in which things come to rest before an episode starts


class World:
    """The ground truth of a running scene. Lengths in m, angles in rad, base frame."""

    def __init__(self, kind: str):
        """kind: of scene.build_scene."""
        self.model = build_scene(kind)
        self.data = mujoco.MjData(self.model)
        self._arm = ArmController(self.model)
        self._things = [self.model.joint(index) for index in range(self.model.njnt)]
        self._things = [joint for joint in self._things if joint.type == mujoco.mjtJoint.mjJNT_FREE]
        self._arm_root = self.model.body_rootid[self.model.body("carriage_left").id]
        self._pads = {self.model.geom(f"pad_{side}").id for side in ("left", "right")}

    def clear(self) -> None:
        """Park every loose thing; what an episode uses is put on the table afterwards."""
        mujoco.mj_resetData(self.model, self.data)
        for index, joint in enumerate(self._things):
            self.data.qpos[joint.qposadr[0] : joint.qposadr[0] + 3] = PARKING_M + np.array([0, 0.1 * index, 0])
            self.model.body_gravcomp[self.model.body(joint.name).id] = 1

    def put(self, thing: str, position: tuple[float, float, float], yaw: float = 0.0) -> None:
        """Place a loose thing."""
        start = self.model.joint(thing).qposadr[0]
        self.data.qpos[start : start + 7] = [*position, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        self.model.body_gravcomp[self.model.body(thing).id] = 0

    def move(self, body: str, position: tuple[float, float, float], yaw: float) -> None:
        """Stand a fixed body somewhere else."""
        fixed = self.model.body(body)
        fixed.pos, fixed.quat = position, [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]

    def put_arm(self, tips: np.ndarray) -> None:
        """Start there with an open gripper that points down, and let everything come to rest."""
        self._arm.reset(self.data, tips)
        mujoco.mj_step(self.model, self.data, nstep=_SETTLE_STEPS)
        self.observe()

    def step(self, action: np.ndarray) -> None:
        """One control step. action: (7,) as types.Decision.action."""
        self._arm.step(self.data, action)
        self.observe()

    def move_arm(self, position: np.ndarray, rotation: np.ndarray, opening: float) -> bool:
        """One control step towards a pose, see ArmController.move."""
        is_taken = self._arm.move(self.data, position, rotation, opening)
        self.observe()
        return is_taken

    def wait(self, seconds: float) -> None:
        """Let time pass while the arm stands."""
        mujoco.mj_step(self.model, self.data, nstep=round(seconds / PHYSICS_STEP_S))
        self.observe()

    def observe(self) -> None:
        """Bring positions and contacts up to date with the state, and measure the arm."""
        mujoco.mj_forward(self.model, self.data)
        self.proprio = measure_proprio(self.model, self.data)

    @property
    def tips(self) -> np.ndarray:
        """(3,) between the finger tips."""
        return self.proprio[:3]

    @property
    def push_back(self) -> float:
        """N: what all that the arm touches pushes it with. What it squeezes between its fingers cancels out."""
        total, force = np.zeros(3), np.zeros(6)
        roots = self.model.body_rootid[self.model.geom_bodyid]
        for index, contact in enumerate(self.data.contact):
            first, second = (roots[geom] == self._arm_root for geom in contact.geom)
            if first != second:
                mujoco.mj_contactForce(self.model, self.data, index, force)
                total += (second - float(first)) * (contact.frame.reshape(3, 3).T @ force[:3])
        return float(np.linalg.norm(total))

    @property
    def opening(self) -> float:
        """0 closed .. 1 open."""
        return self.proprio[6]

    def place(self, body: str) -> np.ndarray:
        """(3,) of a body's origin."""
        return self.data.body(body).xpos.copy()

    def find(self, body: str, point: np.ndarray) -> np.ndarray:
        """(3,): a point of the base frame in a body's own frame."""
        frame = self.data.body(body)
        return frame.xmat.reshape(3, 3).T @ (point - frame.xpos)

    def locate(self, body: str, point) -> np.ndarray:
        """(3,): a point of a body's own frame in the base frame."""
        frame = self.data.body(body)
        return frame.xmat.reshape(3, 3) @ np.asarray(point, dtype=np.float64) + frame.xpos

    def yaw(self, body: str) -> float:
        """Heading of a body's x axis seen from above."""
        matrix = self.data.body(body).xmat
        return float(np.arctan2(matrix[3], matrix[0]))

    def speed(self, thing: str) -> float:
        """m/s of a loose thing."""
        start = self.model.joint(thing).dofadr[0]
        return float(np.linalg.norm(self.data.qvel[start : start + 3]))

    def slide(self, joint: str) -> float:
        """How far a sliding joint is out."""
        return float(self.data.joint(joint).qpos[0])

    def set_slide(self, joint: str, value: float) -> None:
        self.data.joint(joint).qpos[0] = value

    def count_pads(self, body: str) -> int:
        """How many of the two finger pads touch this body."""
        wanted = self.model.body(body).id
        touching = set()
        for first, second in self.data.contact.geom:
            for pad, other in ((first, second), (second, first)):
                if pad in self._pads and self.model.geom_bodyid[other] == wanted:
                    touching.add(int(pad))
        return len(touching)

    @contextmanager
    def pretend(self) -> Iterator[None]:
        """Undo at the end what is put and painted meanwhile, to the last bit."""
        data, colours, floating = copy.copy(self.data), self.model.geom_rgba.copy(), self.model.body_gravcomp.copy()
        proprio = self.proprio
        try:
            yield
        finally:
            mujoco.mj_copyData(self.data, self.model, data)
            self.model.geom_rgba[:], self.model.body_gravcomp[:] = colours, floating
            self.proprio = proprio

    def paint(self, geom: str, colour) -> None:
        """colour: 3 numbers 0..1."""
        self.model.geom(geom).rgba[:3] = colour
