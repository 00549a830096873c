"""Memory from anywhere, registered when it is first used: a bounded cache with reference counts.

In: a `Descriptor` outside every arena. Out: a `Registration` that covers it, usually of its whole allocation, so that
the next piece of the same tensor finds it. It stays while an operation holds it (which is until the operation is
terminal and out of quarantine), and after that for as long as its owner keeps the memory: when the owner lets go it is
deregistered, before the memory can be anybody else's. Past the bound the longest idle one makes room.
Region numbers are never used twice, so that a peer can't mistake one registration for another.
"""

import logging
import threading
import weakref
from collections import OrderedDict

from bus.data_plane.agent import NixlAgent
from bus.data_plane.descriptor import Descriptor, Device
from bus.errors import BusError, LocalProtocolError, PoolExhausted
from schemas.handshake import Region

_LOG = logging.getLogger(__name__)


class Registration:
    """One registered range of foreign memory; pinned by the operations that use it."""

    def __init__(self, cache: "ForeignMemory", region: Region, token: object) -> None:
        self.region = region
        self.num_pins = 0
        self.token = token
        self._cache = cache
        self.owner: weakref.ref[object] | None = None
        self.has_ended = False
        """Its owner is gone: nothing new may use it, and the last pin ends it."""

    def pin(self) -> None:
        """Keep it registered for an operation, which keeps the memory itself."""
        self._cache.pin(self)

    def unpin(self) -> None:
        """Give up one pin."""
        self._cache.unpin(self)

    def covers(self, descriptor: Descriptor) -> bool:
        """Whether the descriptor's bytes lie in it."""
        region = self.region
        end = region.address + region.length_bytes
        return region.address <= descriptor.address and descriptor.address + descriptor.num_bytes <= end


class ForeignMemory:
    """The cache. `regions` is the agent's table, which it adds to and takes from."""

    def __init__(self, agent: NixlAgent, regions: dict[int, Region], max_registrations: int) -> None:
        self._agent = agent
        self._regions = regions
        self._max = max_registrations
        self._cached: OrderedDict[int, Registration] = OrderedDict()
        self._next_region = 0
        self._lock = threading.RLock()  # an owner's end, told by the collector, can come inside of any of these
        self.num_registrations = 0
        """Made by `hold` so far."""
        self.num_deregistrations = 0

    @property
    def num_cached(self) -> int:
        """Registrations that are in force."""
        return len(self._cached)

    def hold(self, descriptor: Descriptor) -> Registration:
        """The registration that covers a descriptor, pinned.

        Raises `PoolExhausted` past the bound, `RegistrationError`.
        """
        key = (descriptor.device.memory_type, descriptor.device.id)
        with self._lock:
            for number, cached in reversed(list(self._cached.items())):  # the collector may end some meanwhile
                is_usable = (
                    number in self._cached
                    and not cached.has_ended
                    and (cached.region.memory_type, cached.region.device_id) == key
                )
                if is_usable and cached.covers(descriptor):
                    self._cached.move_to_end(number)
                    cached.num_pins += 1
                    return cached
            self._make_room()
            owner, address, length_bytes = descriptor.storage or (
                descriptor.owner,
                descriptor.address,
                descriptor.num_bytes,
            )
            registration = self.register(address, length_bytes, descriptor.device)
            self.num_registrations += 1
            self._cached[registration.region.region] = registration
            self._follow(registration, owner)
            registration.num_pins += 1
            return registration

    def register(self, address: int, length_bytes: int, device: Device) -> Registration:
        """Register a range under a new number, outside the cache. Raises `RegistrationError`."""
        with self._lock:
            number = self._next_region
            region = Region(
                region=number,
                address=address,
                length_bytes=length_bytes,
                memory_type=device.memory_type,
                device_id=device.id,
            )
            token = self._agent.register(address, length_bytes, region.memory_type, region.device_id)
            self._next_region += 1
            self._regions[number] = region
            return Registration(self, region, token)

    def pin(self, registration: Registration) -> None:
        """Count one operation more. Raises `LocalProtocolError` for one that has ended."""
        with self._lock:
            if registration.region.region not in self._cached:
                raise LocalProtocolError("the memory's registration has ended; describe it again")
            registration.num_pins += 1

    def unpin(self, registration: Registration) -> None:
        """Count one operation less; without an owner to follow, the last one ends the registration."""
        with self._lock:
            registration.num_pins -= 1
            if registration.num_pins == 0 and (registration.owner is None or registration.has_ended):
                self._end(registration)

    def _follow(self, registration: Registration, owner: object) -> None:
        try:
            registration.owner = weakref.ref(owner, lambda _: self._on_owner_gone(registration))
        except TypeError:  # an owner that can't be followed: the registration ends with its last operation
            registration.owner = None

    def _on_owner_gone(self, registration: Registration) -> None:
        with self._lock:
            registration.has_ended = True
            if registration.num_pins == 0:
                self._end(registration)

    def _make_room(self) -> None:
        if len(self._cached) < self._max:
            return
        for registration in list(self._cached.values()):
            if registration.num_pins == 0:
                self._end(registration)
                return
        raise PoolExhausted(
            f"{len(self._cached)} registrations of foreign memory are all in use",
            remedy="move tensors through bus.arena, reuse them, or raise NIXLBUS_MAX_FOREIGN_REGISTRATIONS",
        )

    def _end(self, registration: Registration) -> None:
        with self._lock:
            if self._cached.pop(registration.region.region, None) is None:
                return
            del self._regions[registration.region.region]
            self.num_deregistrations += 1
            try:
                self._agent.deregister(registration.token)
            except BusError as error:  # whoever let go of the memory can do nothing about it
                _LOG.warning("%s", error)
