"""Offscreen pictures on a machine without a screen: EGL, else OSMesa."""

import atexit
import os
import sys
import threading
import weakref
from importlib import import_module
from typing import Any

import mujoco
import numpy as np

from vlm_local.errors import ConfigError

# .contexts: OpenGL contexts that this thread's closed cameras have left. What the driver compiles for the first
# camera in a context takes a tenth of a second. Cameras at the same time need one each: they change its state.
_idle = threading.local()


class Camera:
    """Renders one camera of one model. Has an OpenGL context for itself: use and close it in one thread."""

    def __init__(
        self,
        model: mujoco.MjModel,
        name: str,
        size: int | tuple[int, int],
        sites: bool = False,
        hidden_group: int | None = None,
    ):
        """size: of the picture, pixels; a pair of width and height shows the same square view, stretched.

        sites: with the marks in the model. hidden_group: of geoms that are not drawn.
        """
        self._model = model
        width, height = (size, size) if isinstance(size, int) else size
        os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's threads cost more than they bring at this size
        self._context: Any = _list_idle().pop() if _list_idle() else _open_context()
        self._context.make_current()
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        model.vis.quality.shadowsize = 256  # 512 looks hardly better and takes twice as long to draw
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(model, maxgeom=400)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._option = mujoco.MjvOption()
        if not sites:
            self._option.sitegroup[:] = 0
        if hidden_group is not None:
            self._option.geomgroup[hidden_group] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = model.camera(name).id
        self._gpu = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._gpu)
        self._flipped = np.empty((height, width, 3), np.uint8)

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """uint8 (height, width, 3) RGB of the state that mj_forward last saw."""
        self._context.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        # Half the width at the near plane; without it the view is as wide as the picture.
        for camera in self._scene.camera:
            camera.frustum_width = (camera.frustum_top - camera.frustum_bottom) / 2
        mujoco.mjr_render(self._viewport, self._scene, self._gpu)
        mujoco.mjr_readPixels(self._flipped, None, self._viewport, self._gpu)
        return self._flipped[::-1].copy()

    def close(self) -> None:
        """Leave the context to the thread's next camera. A camera that is closed already stays so."""
        if self._context is None:
            return
        self._context.make_current()
        self._gpu.free()
        _list_idle().append(self._context)
        self._context = None


def _list_idle() -> list[Any]:
    if not hasattr(_idle, "contexts"):
        _idle.contexts = []
    return _idle.contexts


def _open_context() -> Any:
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    reasons = []
    for name, module in (("egl", "mujoco.egl"), ("osmesa", "mujoco.osmesa")):
        if wanted not in ("", name):
            continue
        platform = os.environ.get("PYOPENGL_PLATFORM")
        try:
            # The size does not matter: a camera draws into a buffer of its own.
            context = import_module(module).GLContext(1, 1)
        except Exception as error:  # PyOpenGL raises AttributeError, ImportError, its own GLError ...
            reasons.append(f"{name}: {error}")
            if platform is None:
                os.environ.pop("PYOPENGL_PLATFORM", None)
            for loaded in [each for each in sys.modules if each.split(".")[0] == "OpenGL"]:
                del sys.modules[loaded]  # it has settled on a platform, and would keep it
            continue
        os.environ.setdefault("MUJOCO_GL", name)
        if threading.current_thread() is threading.main_thread():
            atexit.register(_free, weakref.ref(context))
        return context
    raise ConfigError(
        "the simulator needs EGL or OSMesa to draw pictures without a screen, and neither opened "
        f"({'; '.join(reasons) or f'MUJOCO_GL={wanted} is neither'}). On Debian or Ubuntu: "
        "apt-get install libegl1 libgl1-mesa-dri, or libosmesa6 with MUJOCO_GL=osmesa"
    )


def _free(reference: weakref.ref[Any]) -> None:
    """At exit: OSMesa's context, left to be collected, wants PyOpenGL's modules when they are gone, and says so."""
    context = reference()
    if context is not None:
        context.free()
