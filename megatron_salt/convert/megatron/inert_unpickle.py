"""What a stranger's torch.save holds besides tensors, read without importing or calling anything that it names.

Megatron-LM saves its args as a pickled argparse.Namespace, among enums, dtypes and objects of its own classes. Here a Namespace becomes an
`Arguments`, plain containers become themselves, and every other class, function or tensor becomes an `Inert`: a name that does nothing.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

from megatron_salt.checkpoint.safe_unpickle import Unreadable
from megatron_salt.small_files import LARGEST


class Arguments:
    """An argparse.Namespace of another program."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Named(type):
    """Makes a message show the class that a pickle named."""

    name = ""

    def __repr__(cls) -> str:
        return f"<{cls.name}>"


class Inert(metaclass=_Named):
    """Stands for an object of a class that is not built. It takes whatever a pickle does to an object, and keeps none of it."""

    name = ""
    """What the pickle calls the class."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def append(self, item: object) -> None:
        """Nothing."""

    def extend(self, items: object) -> None:
        """Nothing."""

    def add(self, item: object) -> None:
        """Nothing."""

    def update(self, items: object) -> None:
        """Nothing."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return Arguments
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return _Named("Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return Inert()  # the storage of a tensor


def read_inert(content: io.BufferedIOBase, where: str) -> Any:
    """The object in a file of torch.save, without tensors. `where` names the file. Raises Unreadable."""
    try:
        with zipfile.ZipFile(content) as archive:
            names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError("it is no archive of torch.save")
            size = archive.getinfo(names[0]).file_size
            if size > LARGEST:
                raise ValueError(f"its pickle has {size} bytes, more than the {LARGEST} that are read")
            return _InertUnpickler(io.BytesIO(archive.read(names[0]))).load()
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()[:40])
        raise Unreadable(f"{where} cannot be read: {type(error).__name__}: {reason}") from None
