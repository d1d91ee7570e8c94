"""A common interface to the files in folders, zip and tar archives, which are not unpacked.

No file on the disk is opened or written by a name from an archive. Names that point out of the
archive, and links, are refused nevertheless, since no data set has them.
"""

import hashlib
import io
import os
import pathlib
import stat
import tarfile
import threading
import zipfile
import zlib
from typing import BinaryIO, Protocol, cast

from configs.default import UserError

_IN_MEMORY = 2**29  # bytes; smaller gzip archives are decompressed in memory

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class Container(Protocol):
    """Named files: a folder, or an archive."""

    path: pathlib.Path
    in_order: bool  # reading is only fast in the order of `names`, by one thread

    def names(self) -> list[str]:
        """All regular files, as paths with slashes relative to the container."""
        ...

    def read(self, name: str) -> bytes:
        """The contents of a file."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        ...

    def identity(self) -> tuple[object, ...]:
        """A value that changes when the container changes."""
        ...


def is_archive_name(name: str) -> bool:
    """Whether a file's name is that of a zip or tar archive."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def archive_stem(name: str) -> str:
    """The name of an archive without its suffix."""
    for suffix in sorted(ARCHIVE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def file_identity(path: pathlib.Path) -> tuple[object, ...]:
    """The resolved path, size and modification time of a file."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def member(container: "Container", name: str) -> str:
    """The path of the one file of this name in the container; UserError if there is not one."""
    found = [path for path in container.names() if path.split("/")[-1] == name]
    if len(found) != 1:
        problem = "no" if not found else "more than one"
        raise UserError(f"{container.path} has {problem} file {name}")
    return found[0]


def damaged(path: pathlib.Path, error: Exception | str) -> UserError:
    """The error for a file that can't be read."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path} is damaged or cut off ({reason}); bring the file again")


def _check_name(path: pathlib.Path, name: str, is_link: bool = False) -> None:
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"{path} has an entry {name!r}, which points out of the archive; refused")
    if is_link:
        raise UserError(f"{path} has a link or a device, {name!r}; refused")


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


class Folder:
    """The files below a folder, without hidden files; links to folders are followed."""

    in_order = False

    def __init__(self, path: pathlib.Path) -> None:
        """Nothing is read until it is needed."""
        self.path = path
        self._files: dict[str, tuple[int, int]] | None = None  # name → size, modification time

    def _scan(self) -> dict[str, tuple[int, int]]:
        if self._files is None:
            found: dict[str, tuple[int, int]] = {}
            self._scan_below(self.path, "", found, {os.path.realpath(self.path)})
            self._files = dict(sorted(found.items()))
        return self._files

    def _scan_below(
        self,
        folder: pathlib.Path | str,
        prefix: str,
        found: dict[str, tuple[int, int]],
        above: set[str],
    ) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if real not in above:  # a link to a parent folder would be followed forever
                        self._scan_below(
                            entry.path, f"{prefix}{entry.name}/", found, above | {real}
                        )
                elif entry.is_file():
                    status = entry.stat()
                    found[prefix + entry.name] = (status.st_size, status.st_mtime_ns)

    def names(self) -> list[str]:
        """All regular files, sorted."""
        return list(self._scan())

    def read(self, name: str) -> bytes:
        """The contents of a file."""
        return (self.path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        return (self.path / name).open("rb")

    def identity(self) -> tuple[object, ...]:
        """The path, and a hash of all names, sizes and times."""
        digest = hashlib.sha256()
        for name, status in self._scan().items():
            digest.update(f"{name}\0{status}\n".encode())
        return str(self.path.resolve()), digest.hexdigest()


class Zip:
    """The files in a zip archive."""

    in_order = False

    def __init__(self, path: pathlib.Path) -> None:
        """Read the table of contents; UserError if the archive is damaged."""
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise damaged(path, error) from error
        self._names = []
        for info in self._zip.infolist():
            _check_name(path, info.filename, stat.S_ISLNK(info.external_attr >> 16))
            if not info.is_dir() and not _is_hidden(info.filename):
                self._names.append(info.filename)
        self._names.sort()

    def names(self) -> list[str]:
        """All regular files, sorted."""
        return self._names

    def read(self, name: str) -> bytes:
        """The contents of a file."""
        try:
            return self._zip.read(name)
        except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise damaged(self.path, f"{name}: {error}") from error

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        return cast(BinaryIO, self._zip.open(name))

    def identity(self) -> tuple[object, ...]:
        """The path, size and modification time."""
        return file_identity(self.path)


class Tar:
    """The files in a tar archive, compressed or not."""

    def __init__(self, path: pathlib.Path) -> None:
        """Open the archive, decompressing a small one; UserError if it is not a tar archive."""
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # offset and size of each file
        self._lock = threading.Lock()
        try:
            whole = _decompress(path) if _compression(path) == "gz" else None
            self.in_order = whole is None and _compression(path) is not None
            # It stays open as long as this object exists.
            self._tar = tarfile.open(path if whole is None else None, fileobj=whole)  # noqa: SIM115
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise damaged(path, error) from error

    def _index(self) -> dict[str, tuple[int, int]]:
        """Name → (offset, size) of the regular files, in the archive's order."""
        if not self._places:
            try:
                for member in self._tar:
                    self._tar.members = []  # type: ignore[attr-defined]  # don't keep all
                    _check_name(self.path, member.name, not (member.isreg() or member.isdir()))
                    name = member.name.removeprefix("./")
                    if member.isreg() and not member.issparse() and not _is_hidden(name):
                        self._places[name] = (member.offset_data, member.size)
                while self._tar.fileobj.read(2**20):  # type: ignore[union-attr]
                    pass  # read to the end, where a compressed archive has its checksum
            except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
                raise damaged(self.path, error) from error
        return self._places

    def names(self) -> list[str]:
        """All regular files: in the archive's order if `in_order`, else sorted."""
        return list(self._index()) if self.in_order else sorted(self._index())

    def read(self, name: str) -> bytes:
        """The contents of a file."""
        offset, size = self._index()[name]
        try:
            with self._lock:
                self._tar.fileobj.seek(offset)  # type: ignore[union-attr]
                data = self._tar.fileobj.read(size)  # type: ignore[union-attr]
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(self.path, error) from error
        if len(data) < size:
            raise damaged(self.path, f"it ends within {name}")
        return data

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        info = tarfile.TarInfo(name)
        info.offset_data, info.size = self._index()[name]
        return cast(BinaryIO, self._tar.extractfile(info))

    def identity(self) -> tuple[object, ...]:
        """The path, size and modification time."""
        return file_identity(self.path)


def _decompress(path: pathlib.Path) -> io.BytesIO | None:
    """The decompressed contents of a gzip file; None if it is large or has several parts."""
    if path.stat().st_size > _IN_MEMORY:
        return None
    decompressor = zlib.decompressobj(wbits=31)
    data = decompressor.decompress(path.read_bytes(), 4 * _IN_MEMORY)
    if decompressor.unconsumed_tail or decompressor.unused_data:
        return None
    if not decompressor.eof:
        raise EOFError("it ends too early")
    return io.BytesIO(data)


def _compression(path: pathlib.Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(6)
    for magic, name in ((b"\x1f\x8b", "gz"), (b"BZh", "bz2"), (b"\xfd7zXZ\0", "xz")):
        if start.startswith(magic):
            return name
    return None


def open_container(path: pathlib.Path) -> Container:
    """Open a folder, a zip or a tar archive.

    Raises:
      UserError: the path does not exist, or is none of these.
    """
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise UserError(f"data.path: there is no file or folder {path}")
    with path.open("rb") as file:
        start = file.read(512)
    if start.lstrip()[:1] == b"<":
        raise UserError(
            f"{path} is a web page, not an archive: a download that asked for confirmation, as "
            "Google Drive's does for large files, or for a login; download it in a browser"
        )
    if start.startswith(b"PK"):
        return Zip(path)
    if _compression(path) or start[257:262] == b"ustar" or tarfile.is_tarfile(path):
        return Tar(path)
    raise UserError(f"{path} is neither a folder nor a zip or tar archive")
