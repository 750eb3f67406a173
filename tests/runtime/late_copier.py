"""A device's order of things, on a CPU: an upload is done when something waits for it, and not before."""

from collections.abc import Sequence

from bdlora_compile.runtime.copier import PlainCopier, Ticket, Work


class LateCopier(PlainCopier):
    """Does an upload as late as a device may: when something waits for it. Uploads keep their order, as on a stream."""

    def __init__(self) -> None:
        self.queue: list[tuple[int, Work]] = []
        self.count = 0

    def upload(self, work: Work) -> Ticket:
        self.count += 1
        self.queue.append((self.count, work))
        return self.count

    def step(self, tickets: Sequence[Ticket]) -> None:
        self._wait(tickets)

    def between_steps(self, work: Work, tickets: Sequence[Ticket]) -> None:
        self._wait(tickets)
        work()

    def _wait(self, tickets: Sequence[Ticket]) -> None:
        last = max((ticket for ticket in tickets if isinstance(ticket, int)), default=0)
        while self.queue and self.queue[0][0] <= last:
            self.queue.pop(0)[1]()
