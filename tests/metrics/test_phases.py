"""Phases add up; they are the device's time; nobody waits for the device before somebody asks for the seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from megatron_salt.metrics.phases import DeviceClock, HostClock, PhaseTimer, clock_of_device


class Hands:
    """A clock that is set by hand. A mark is its time."""

    now = 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, begun: float, ended: float) -> float:
        return ended - begun


def test_phases_add_up_and_an_inner_phase_is_not_counted_twice():
    clock = Hands()
    timer = PhaseTimer(clock)
    for _ in range(2):
        with timer.phase("optimizer"):
            clock.now += 1
            with timer.phase("data"):
                clock.now += 10
            clock.now += 2
        clock.now += 100  # in no phase
    taken = timer.take()
    with timer.phase("data"):
        clock.now += 7
    assert taken() == taken() == {"optimizer": 6.0, "data": 20.0}
    assert timer.take()() == {"data": 7.0}
    assert timer.take()() == {}


def test_a_phase_ends_when_its_body_fails():
    clock = Hands()
    timer = PhaseTimer(clock)
    with pytest.raises(KeyError), timer.phase("data"):
        clock.now += 1
        raise KeyError
    clock.now += 5
    assert timer.take()() == {"data": 1.0}


@dataclass
class Device:
    """A GPU that works through its launches behind the host. An event is reached when all work before it is done."""

    host: float = 0.0
    """Seconds; launching takes no time."""
    busy_until: float = 0.0
    waits: list[float] = field(default_factory=list)
    """Host times at which something waited for the device."""

    def launch(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.host) + seconds

    def event(self, enable_timing: bool = False) -> Event:
        return Event(self, enable_timing)


@dataclass
class Event:
    device: Device
    timed: bool
    reached: float | None = None

    def record(self) -> None:
        self.reached = max(self.device.busy_until, self.device.host)

    def query(self) -> bool:
        return self.reached is not None and self.reached <= self.device.host

    def synchronize(self) -> None:
        assert self.reached is not None
        self.device.waits.append(self.device.host)
        self.device.host = max(self.device.host, self.reached)

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds. As in CUDA, an error unless both events have been reached."""
        assert self.timed and later.timed and self.reached is not None and later.reached is not None
        assert later.reached <= self.device.host
        return 1000 * (later.reached - self.reached)


def test_with_a_gpu_phases_are_the_devices_and_the_host_waits_only_when_seconds_are_read(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    timer, steps = PhaseTimer(DeviceClock()), []
    for _ in range(3):
        with timer.phase("data"):
            device.host += 0.5  # the device still has the last optimizer step to do
        with timer.phase("forward-backward"):
            device.launch(4.0)
        with timer.phase("optimizer"):
            device.launch(1.0)
            device.host = device.busy_until  # the gradient norm is read
            device.launch(0.25)
        steps.append(timer.take())
    assert not device.waits
    expected = {"data": 0.25, "forward-backward": 4.0, "optimizer": 1.25}
    assert steps[0]() == pytest.approx(expected | {"data": 0.5}) and steps[1]() == pytest.approx(expected)
    assert not device.waits  # the device has passed these steps
    assert steps[2]() == pytest.approx(expected) and device.waits == [device.busy_until - 0.25]


def test_one_place_chooses_the_clock():
    assert isinstance(clock_of_device(), DeviceClock if torch.cuda.is_available() else HostClock)
