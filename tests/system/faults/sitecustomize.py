"""Kills the node at one exact place: put this folder on PYTHONPATH and set DIE_AT.

DIE_AT=module:Class.method:before|after:tree|self:marker
    `tree` sends SIGKILL to the whole process group, `self` to this process alone; where `marker` names a file, the
    killing happens once: the file is made first. The node's own code is untouched: a power cut looks the same to it.
"""

import functools
import importlib.abc
import importlib.util
import os
import signal
import sys

MODULE, PLACE, WHEN, WHOM, MARKER = (os.environ.get("DIE_AT") or "::::").split(":")


def die():
    if MARKER:
        if os.path.exists(MARKER):
            return
        with open(MARKER, "w") as file:
            os.fsync(file.fileno())
    os.killpg(0, signal.SIGKILL) if WHOM == "tree" else os.kill(os.getpid(), signal.SIGKILL)


def deadly(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if WHEN == "before":
            die()
        result = function(*args, **kwargs)
        if WHEN == "after":
            die()
        return result

    return wrapped


class PatchOnImport(importlib.abc.MetaPathFinder):
    """Finds the module like everybody else, then wraps the one method when it has been executed."""

    def find_spec(self, name, *_):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            *owners, last = PLACE.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, last, deadly(getattr(owner, last)))

        spec.loader.exec_module = exec_module
        return spec


if MODULE:
    sys.meta_path.insert(0, PatchOnImport())
