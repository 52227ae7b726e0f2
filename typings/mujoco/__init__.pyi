# For the type checker: MuJoCo's compiled module brings no stubs, so whatever it holds is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
