"""A common interface to the files in folders, zip and tar archives, which are not unpacked.

No file on the disk is opened or written by a name from an archive. Names that point out of the
archive, and links to other places, are refused nevertheless, since no data set has them.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import os
import pathlib
import posixpath
import stat
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from configs.errors import UserError

_IN_MEMORY = 2**29  # bytes; smaller gzip archives are decompressed in memory
_SMALL, _MOST = 2**26, 100  # larger entries are refused if they are so many times their packed size

ARCHIVE_SUFFIXES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".zip", ".tar")
_SYSTEM = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_INSTEAD = {
    (".npy", ".npz"): "arrays are read by configs/vp/array_st.py",
    ARCHIVE_SUFFIXES: "unpack the archives in it, or name one of them",
    (".parquet",): "name the folder of the parquet files",
    (".pt", ".pth", ".pkl", ".h5", ".hdf5", ".zarr", ".zarray", ".zgroup", "zarr.json", ".mat"): (
        "save its images as files or as an .npy array first"
    ),
}


class Container:
    """Named files: a folder, or an archive; names are paths with slashes.

    Attributes:
      path: of the folder or archive.
      files: where each file is, by name; of an archive in its order.
      skipped: what is passed over: hidden files, folders of systems, broken links.
      kind: a word for it in descriptions.
      in_order: reading is only fast in the order of `files`, by one thread.
    """

    in_order = False
    kind = "archive"
    _lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    files: dict[str, Any]

    def __init__(self, path: pathlib.Path) -> None:
        """Nothing is read until it is needed."""
        self.path, self.skipped = path, list[str]()

    def names(self) -> list[str]:
        """All regular files, sorted."""
        return sorted(self.files)

    def read(self, name: str) -> bytes:
        """The contents of a file; any error that a damaged file makes its library raise."""
        with self._lock, self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        return (self.path / name).open("rb")

    def identity(self) -> tuple[object, ...]:
        """A value that changes when the container changes."""
        return file_identity(self.path)

    def passed_over(self, is_used: Callable[[str], bool]) -> tuple[str, ...]:
        """A sentence that counts and names the files that are not used; (): there are none."""
        names = [*(name for name in self.names() if not is_used(name)), *self.skipped]
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        told = f"{len(names)} files or folders of {self.path} are passed over: {shown}"
        # Names that are not UTF-8 can't be printed.
        return (told.encode(errors="backslashreplace").decode(),) if names else ()

    def _place(self, found: dict[str, Any], name: str, place: Any, size: int, packed: int) -> None:
        """Add a file of an archive; of two of a name the last one counts, as for unzip and tar."""
        if size > _SMALL and size > _MOST * packed:
            raise UserError(
                f"{self.path} has {name} of {size:,} bytes, packed into {packed:,}; unpack it"
            )
        plain = posixpath.normpath(name.replace("\\", "/"))
        if plain.startswith(("/", "../")) or ".." in name.replace("\\", "/").split("/"):
            raise UserError(
                f"{self.path} has an entry {name!r}, which points out of the archive; refused"
            )
        if is_hidden(plain):
            self.skipped.append(plain)
        else:
            found[plain] = place


def is_archive_name(name: str) -> bool:
    """Whether a file's name is that of a zip or tar archive."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def archive_stem(name: str) -> str:
    """The name of an archive without its suffix."""
    suffix = next((suffix for suffix in ARCHIVE_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def is_hidden(name: str) -> bool:
    """Whether a path is of a hidden file or in a folder that systems make."""
    return any(part.startswith(_SYSTEM) for part in name.split("/"))


def instead(names: Iterable[str]) -> str:
    """What to do with files of these names, which are not read as images: "; …", or nothing."""
    for name in names:
        for suffixes, advice in _INSTEAD.items():
            if name.lower().endswith(suffixes):
                return f"; {advice}"
    return ""


def file_identity(path: pathlib.Path) -> tuple[object, ...]:
    """The resolved path, size and modification time of a file."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def member(container: Container, name: str) -> str:
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


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Where libraries read a file: any error that they raise for a damaged one is `damaged`'s."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise damaged(path, error) from error


class Folder(Container):
    """The files below a folder, with their sizes and times; links to folders are followed."""

    kind = "files"

    @functools.cached_property
    def files(self) -> dict[str, Any]:  # type: ignore[override]
        """Name → (size, modification time), sorted."""
        found: dict[str, Any] = {}
        self._scan(str(self.path), "", found, {os.path.realpath(self.path)})
        return dict(sorted(found.items()))

    def _scan(self, folder: str, prefix: str, found: dict[str, Any], above: set[str]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                name, is_folder = prefix + entry.name, entry.is_dir()
                real = os.path.realpath(entry.path) if is_folder else ""
                if is_hidden(entry.name) or real in above:  # a link to a parent has no end
                    self.skipped.append(name)
                elif is_folder:
                    self._scan(entry.path, f"{name}/", found, above | {real})
                elif entry.is_file():
                    status = entry.stat()
                    found[name] = (status.st_size, status.st_mtime_ns)
                else:  # a broken link or a device
                    self.skipped.append(name)

    def identity(self) -> tuple[object, ...]:
        """The path, and a hash of all names, sizes and times."""
        digest = hashlib.sha256()
        for name, status in self.files.items():
            digest.update(os.fsencode(f"{name}\0{status}\n"))
        return str(self.path.resolve()), digest.hexdigest()


class Zip(Container):
    """The files in a zip archive."""

    def __init__(self, path: pathlib.Path) -> None:
        """Read the table of contents; UserError if the archive can't be read."""
        super().__init__(path)
        self.files = {}
        with reading(path):
            self._zip = zipfile.ZipFile(path)
        for info in self._zip.infolist():
            if info.is_dir():
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                raise UserError(f"{path} has a link, {info.filename!r}; refused")
            if info.flag_bits & 1:
                raise UserError(f"{path} is encrypted; unpack it")
            if info.compress_type not in (0, 8, 12, 14):  # stored, deflate, bzip2, lzma
                kind = "deflate64" if info.compress_type == 9 else f"method {info.compress_type}"
                raise UserError(f"{path} is packed by {kind}, which is not read here; unpack it")
            self._place(self.files, info.filename, info, info.file_size, info.compress_size)

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        return cast(BinaryIO, self._zip.open(self.files[name]))


class Tar(Container):
    """The files in a tar archive, compressed or not."""

    def __init__(self, path: pathlib.Path) -> None:
        """Open the archive, decompressing a small one; UserError if it is not a tar archive."""
        super().__init__(path)
        self._lock = threading.Lock()
        with reading(path):
            whole = _decompress(path) if _compression(path) == "gz" else None
            self.in_order = whole is None and _compression(path) is not None
            # It stays open as long as this object exists.
            self._tar = tarfile.open(path if whole is None else None, fileobj=whole)  # noqa: SIM115

    @functools.cached_property
    def files(self) -> dict[str, Any]:  # type: ignore[override]
        """Name → (offset, size), in the archive's order."""
        found: dict[str, Any] = {}
        with reading(self.path):
            for info in self._tar:
                self._tar.members = []  # type: ignore[attr-defined]  # don't keep all
                place: Any = (info.offset_data, info.size)
                if info.islnk():  # a second name of an earlier file
                    place = found.get(posixpath.normpath(info.linkname))
                if place is None or not (info.isreg() or info.islnk() or info.isdir()):
                    raise UserError(f"{self.path} has a link or a device, {info.name!r}; refused")
                if info.issparse():
                    raise UserError(f"{self.path} has a sparse file, {info.name!r}; unpack it")
                if not info.isdir():
                    self._place(found, info.name, place, place[1], self.path.stat().st_size)
            # Read to the end, where a compressed archive has its checksum.
            while part := self._tar.fileobj.read(2**20):  # type: ignore[union-attr]
                if part.strip(b"\0"):
                    raise UserError(
                        f"{self.path} goes on behind its end, as archives do that were joined; "
                        "unpack each of them"
                    )
        return found

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; threads must take turns."""
        info = tarfile.TarInfo(name)
        info.offset_data, info.size = self.files[name]
        return cast(BinaryIO, self._tar.extractfile(info))


def _decompress(path: pathlib.Path) -> io.BytesIO | None:
    """The decompressed contents of a gzip file; None if it is large."""
    size = path.stat().st_size
    if size > _IN_MEMORY:
        return None
    most = min(4 * _IN_MEMORY, _SMALL + _MOST * size)
    with gzip.open(path) as file:
        data = file.read(most + 1)
    return io.BytesIO(data) if len(data) <= most else None


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
    advice = instead([path.name])
    raise UserError(f"{path} is neither a folder nor a zip or tar archive{advice}")


def all_of(path: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    """The files of these names in a folder; []: there is none of them; UserError: only some."""
    files = [path / name for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.exists()]
    if 0 < len(missing) < len(files):
        raise UserError(f"data.path: {path} has no {missing[0]}")
    return [] if missing else files


def open_holder(path: pathlib.Path, first: str, folder: str, archive: str) -> Container | None:
    """The container of an author's files, such as `first`; None if there is none.

    `path` is the archive, the folder that was unpacked from it, or the parent of either.
    """
    for place in (path / folder, path):
        if (place / first).exists():
            return Folder(place)
    place = path if path.is_file() else path / archive
    held = open_container(place) if place.exists() else None
    return held if held and any(name.split("/")[-1] == first for name in held.names()) else None
