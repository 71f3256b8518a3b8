"""Lanes to a device that is not there, and as late as a real one may be.

A copy is carried out when somebody waits for its event, and not before; what was sent earlier may come later. Until
then the device's tensors hold rubbish, and pinned memory that was let go of may be another batch's.
"""

from __future__ import annotations

import threading
import weakref

import torch

RUBBISH = 113  # no label and no token of the tests' models: whatever reads it fails, or scores another sample


class Event:
    def __init__(self, copies):
        self._copies, self._lock, self.done = copies, threading.Lock(), False

    def carry_out(self):
        with self._lock:
            for source, there in [] if self.done else self._copies:
                there.copy_(source)
            self.done = True


class LateLanes:
    """Keeps a log of what was called, in order.

    Args:
        fails: numbers of tensors, counted from 1, that find no room on the device.
        broken: to wait for an event is an error.
        stood_still: seconds that every wait is said to have cost the device.
    """

    def __init__(self, fails=(), broken=False, stood_still=0.0):
        self.log, self.events, self.slots, self.sending = [], [], 0, threading.Semaphore(0)
        self._free, self._since, self._tensors = [], [], 0
        self._fails, self._broken, self._stood_still = fails, broken, stood_still

    def pinned(self, tensor):
        """A copy in a slot that is free again when nobody holds what is given out."""
        fitting = [slot for slot in self._free if slot.nbytes >= tensor.nbytes]
        if fitting:
            slot = fitting[0]
            self._free = [other for other in self._free if other is not slot]
        else:
            self.slots, slot = self.slots + 1, torch.empty(max(tensor.nbytes, 1), dtype=torch.uint8)
        lent = slot[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        weakref.finalize(lent, lambda: self._free.append(slot))
        return lent

    def copy(self, tensor):
        self._tensors += 1
        if self._tensors in self._fails:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        there = torch.full_like(tensor, RUBBISH)
        self._since.append((tensor.detach(), there))  # the memory without a hold on the slot, as an address is
        return there

    def mark(self):
        self.log.append(f"sent {len(self.events)}")
        self.events.append(Event(self._since))
        self._since = []
        self.sending.release()
        return self.events[-1]

    def passed(self, event):
        return event.done

    def finish(self, event):
        self.log.append(f"finish {self.events.index(event)}")
        if self._broken:
            raise RuntimeError("CUDA error: the device fell off the bus")
        event.carry_out()

    def wait(self, event, batch):
        self.log.append(f"wait {self.events.index(event)}")
        event.carry_out()
        return event

    def seconds(self, wait):
        assert wait.done
        return self._stood_still
