"""One budget for the bytes that clients have sent and nobody has worked on yet, over HTTP and websocket together."""

from collections.abc import Callable, Iterable
from typing import Protocol

MAX_HELD = 2**28  # bytes; 16 robots with 256x256 pictures hold 4 MB


class Holder(Protocol):
    """A connection. Any thread may call it."""

    @property
    def num_held(self) -> int:
        """Bytes of requests and of unsent answers; 0 once it was told to end."""
        ...

    @property
    def may_end(self) -> bool:
        """Whether it holds more than a request that is being answered: that one is carried out all the same."""
        ...

    def end(self) -> None:
        """Hang up, now or soon. Does not wait."""
        ...


class Budget:
    """Holders are listed anew for each look: `listings` are functions that give all of one kind."""

    def __init__(self):
        self.listings: list[Callable[[], Iterable[Holder]]] = []

    def keep(self) -> None:
        """End the connection that holds the most bytes, where all together exceed MAX_HELD. Any thread may call it."""
        holders = [holder for listing in self.listings for holder in listing()]
        if sum(holder.num_held for holder in holders) > MAX_HELD:
            under_way = [holder for holder in holders if holder.may_end]
            if under_way:
                max(under_way, key=lambda holder: holder.num_held).end()
