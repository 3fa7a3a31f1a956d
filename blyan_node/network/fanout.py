"""Bounded one-to-many queues whose full receivers lose their oldest; they never block senders."""

from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Queue(Generic[T]):
    """One receiver's queue. `put` returns how many items (0 or 1) were lost to make room."""

    def __init__(self, capacity: int) -> None:
        self._send, self._receive = trio.open_memory_channel[T](capacity)
        self._oldest = self._receive
        self.receiver = self._receive.clone()

    @property
    def abandoned(self) -> bool:
        """Whether the receiver closed its end."""
        return self._send.statistics().open_receive_channels < 2

    def put(self, item: T) -> int:
        """Queues `item`; where the queue is full the oldest one goes."""
        lost = 0
        try:
            self._send.send_nowait(item)
        except trio.WouldBlock:
            self._oldest.receive_nowait()
            lost = 1
            self._send.send_nowait(item)
        return lost

    def close(self) -> None:
        """Ends the receiver's iteration, after what is queued."""
        self._send.close()
        self._oldest.close()


class Fanout(Generic[T]):
    """Hands each item to every receiver that is still open."""

    def __init__(self) -> None:
        self._queues: list[Queue[T]] = []

    def add(self, capacity: int) -> Queue[T]:
        """A new receiver; it gets what is put from now on."""
        queue = Queue[T](capacity)
        self._queues.append(queue)
        return queue

    def put(self, item: T) -> int:
        """Queues `item` for all; returns how many items were lost to full queues."""
        self._queues = [queue for queue in self._queues if not queue.abandoned]
        return sum(queue.put(item) for queue in self._queues)

    def close(self) -> None:
        """Ends every receiver's iteration."""
        for queue in self._queues:
            queue.close()
        self._queues.clear()
