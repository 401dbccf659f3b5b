"""Downloads that resume, are verified and never leave half a file; unpacking of archives that are not trusted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import ipaddress
import json
import os
import shutil
import socket
import ssl
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

import dckd_sr
from dckd_sr.errors import UserError
from dckd_sr.locks import hold

TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 3  # transfers that bring nothing new, before giving up
PAUSE = 1.0  # seconds between them
_CHUNK = 2**20
_RATIO, _FREE = 100, 2**26  # so many times its size, and so many bytes, an archive may unpack to: images take far less
_LONGEST = 2**20  # bytes of a file's name and attributes in a tar file
_FULL = (errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC))
_NETWORK = (ConnectionError, TimeoutError, socket.timeout, ssl.SSLError)
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError, RuntimeError)


class _Interrupted(Exception):
    """A transfer that another attempt may complete; its text says what went wrong."""


class _Restart(Exception):
    """The partial file does not belong to what the server holds now."""


def fetch(url, target, sha256=None, size=None, progress=True):
    """Download a file; an interrupted one continues at the next call.

    Until it is complete and verified, the file is TARGET.part; TARGET.part.info beside it holds the server's validator
    and is locked, so that a second process waits for the first and then finds the target.

    Args:
        url: https; http only on this machine (localhost).
        target: the file to write. One that is there already is verified and returned.
        sha256: hexadecimal hash or its first digits, at least 8; None: no check.
        size: bytes, or None.
        progress: show a bar.

    Returns:
        Path: target.

    Raises:
        UserError: not found, refused, no network, too slow, cut off, another hash or size, no space, not writable, or a
            target that is there with another hash. The target is as it was before.
    """
    _check_url(url)
    target = Path(target).expanduser()
    expected = None if sha256 is None else sha256.lower()
    if expected is not None and (len(expected) < 8 or set(expected) - set('0123456789abcdef')):
        raise ValueError(f'{sha256} is no hash of at least 8 hexadecimal digits')
    try:
        if not _is_there(target, expected):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f'{target.name}.part')
            with _locked(part) as info:
                if not _is_there(target, expected):  # another process was faster
                    _transfer_all(url, part, info, expected, size, progress)
                    os.replace(part, target)
                    _sync_folder(target.parent)
    except OSError as error:
        raise UserError(f'cannot write {target}: {error.strerror or error}') from error
    return target


def sha256_of(path):
    """Hash of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _check_url(url):
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != 'https' and not (parts.scheme == 'http' and _is_local(parts.hostname)):
        raise UserError(f'{url}: only https is used for downloads')


def _is_local(host):
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host or '').is_loopback
    return host == 'localhost'


def _is_there(target, expected):
    if not target.exists():
        return False
    if not target.is_file():
        raise UserError(f'{target} is a folder, not a file')
    if expected is not None:
        found = sha256_of(target)
        if not found.startswith(expected):
            raise UserError(f'{target} is there with sha256 {found}, not {expected}; delete it or name another folder')
    return True


@contextlib.contextmanager
def _locked(part):
    """Hold the lock of a partial file, waiting for other processes; its info file, open, is there as long as it is."""
    path, waiting = part.with_name(f'{part.name}.info'), False
    while (file := hold(path)) is None:
        if not waiting:
            print(f'another process is downloading {part.stem}: waiting', file=sys.stderr)
            waiting = True
        time.sleep(0.2)
    with file:
        try:
            yield file
        finally:
            if not part.exists():
                with contextlib.suppress(OSError):  # Windows keeps it while it is open
                    path.unlink()


def _transfer_all(url, part, info, expected, size, progress):
    """Bring the partial file to its end and verify it."""
    failures, restarts = 0, 0
    resumed = part.exists()
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, info, expected, size, progress)
            found = sha256_of(part)
            if expected is None or found.startswith(expected):
                break
            if not resumed or restarts:
                _forget(part, info)
                raise UserError(f'{url}: the file has sha256 {found}, expected {expected}; it was removed')
            raise _Restart  # what was there before may have been of another file
        except _Restart as error:
            _forget(part, info)
            resumed, restarts = False, restarts + 1
            if restarts > ATTEMPTS:
                _forget(part, info)
                raise UserError(f'{url}: the server holds another file at every request') from error
        except _Interrupted as error:
            after = part.stat().st_size if part.exists() else 0
            failures = 1 if after > before else failures + 1
            if failures >= ATTEMPTS:
                kept = f'; {_amount(after)} are kept, the next run continues' if after else ''
                if not after:
                    _forget(part, info)
                raise UserError(f'{url}: {error}{kept}') from error
            resumed = after > 0
            time.sleep(PAUSE)
        except UserError:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()
            raise


def _forget(part, info):
    part.unlink(missing_ok=True)
    info.seek(0)
    info.truncate()


def _transfer(url, part, info, expected, size, progress):
    """One request: append to the partial file what it lacks."""
    have = part.stat().st_size if part.exists() else 0
    validator = _validator(info, url)
    headers = {'User-Agent': f'dckd_sr/{dckd_sr.__version__}', 'Accept-Encoding': 'identity'}
    if have and (validator or expected):
        headers['Range'] = f'bytes={have}-'
        if validator:
            headers['If-Range'] = validator
    try:
        with _open(url, headers, part, have) as response:
            if response is None:  # the partial file is all there is
                return
            have = have if response.status == 206 else 0
            total = _total(response, have, url)
            if size is not None and total is not None and total != size:
                raise UserError(f'{url}: {total} bytes, expected {size}')
            total = total if total is not None else size
            _check_space(part, total, have)
            _note(info, url, response)
            with open(part, 'ab' if have else 'wb') as file, _bar(part, total, have, progress) as bar:
                while block := response.read(_CHUNK):
                    _write(file, block, part, total)
                    bar.update(len(block))
                file.flush()
                os.fsync(file.fileno())
                written = file.tell()
            if total is not None and written != total:
                if written > total:
                    raise _Restart
                raise _Interrupted(f'the transfer ended after {_amount(written)} of {_amount(total)}')
    except (urllib.error.URLError, http.client.HTTPException, *_NETWORK) as error:
        raise _Interrupted(_reason(error)) from error


@contextlib.contextmanager
def _open(url, headers, part, have):
    """The server's answer; None where the partial file is complete already."""
    try:
        with urllib.request.build_opener(_Redirects).open(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        ) as response:
            kind = response.headers.get_content_type()
            if kind == 'text/html' and Path(part.stem).suffix not in ('.html', '.htm'):
                raise UserError(f'{url}: a web page instead of the file; open it in a browser to see what it asks for')
            yield response
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            if error.headers.get('Content-Range', '').strip() == f'bytes */{have}':
                yield None
                return
            raise _Restart from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Interrupted(f'the server fails (HTTP {error.code} {error.reason})') from error
        what = {401: 'refused', 403: 'refused', 404: 'not found', 410: 'not found any more'}.get(error.code, 'failed')
        raise UserError(f'{url}: {what} (HTTP {error.code})') from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _total(response, have, url):
    """Size of the whole file as the server states it, or None."""
    if response.status == 206:
        span, _, total = response.headers.get('Content-Range', '').removeprefix('bytes ').partition('/')
        if span.partition('-')[0].strip() != str(have):
            raise _Restart
        return int(total) if total.isdigit() else None
    length = response.headers.get('Content-Length', '')
    return int(length) if length.isdigit() else None


def _validator(info, url):
    info.seek(0)
    try:
        noted = json.loads(info.read() or b'{}')
    except ValueError:
        return None
    return noted.get('validator') if noted.get('url') == url else None


def _note(info, url, response):
    """Keep what tells a later run whether the file is still the same one."""
    etag = response.headers.get('ETag') or ''
    validator = response.headers.get('Last-Modified') if not etag or etag.startswith('W/') else etag
    info.seek(0)
    info.truncate()
    info.write(json.dumps({'url': url, 'validator': validator}).encode())
    info.flush()


def _check_space(part, total, have):
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise UserError(
            f'cannot write {part.with_suffix("")}: it needs {_amount(total - have)}, the disk has {_amount(free)} free'
        )


def _write(file, block, part, total):
    try:
        file.write(block)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        with contextlib.suppress(OSError):
            file.close()
        part.unlink(missing_ok=True)
        needed = f' (it needs {_amount(total)})' if total else ''
        raise UserError(f'cannot write {part.with_suffix("")}: the disk is full{needed}') from error


def _bar(part, total, have, progress):
    return tqdm(
        desc=part.stem,
        total=total,
        initial=have,
        disable=not progress,
        unit='B',
        unit_scale=True,
        unit_divisor=1024,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )


def _reason(error):
    error = getattr(error, 'reason', error)
    if isinstance(error, (TimeoutError, socket.timeout)):
        return f'no answer within {TIMEOUT:g} s'
    if isinstance(error, socket.gaierror):
        return 'no such host; is there a network?'
    if isinstance(error, ssl.SSLError):
        return f'no safe connection ({error.reason or error})'
    if isinstance(error, OSError) and error.strerror:
        return f'no connection ({error.strerror})'
    return f'the transfer broke off ({error or type(error).__name__})'


def _amount(count):
    return tqdm.format_sizeof(count, 'B', 1024)


def _sync_folder(folder):
    """Make the new name last; some systems cannot."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def unpack(archive, folder, members=None, progress=True):
    """Unpack a zip or tar file, each file written whole or not at all.

    Args:
        archive: .zip, or .tar in any compression that tarfile reads.
        folder: where to; made if missing. Files that are there with the right size are left alone.
        members: names of files in the archive to take; None: all.
        progress: show a bar.

    Returns:
        list[Path]: the files, in the archive's order.

    Raises:
        UserError: not an archive, damaged, encrypted, without one of the members, or with entries that are no plain
            files inside the folder (``..``, absolute paths, links, devices) or claim a hundred times the archive's
            size or more than the disk has, found before anything is written; or the folder cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        with _opened(archive) as entries:
            entries = [entry for entry in entries if entry is not None]
            inside = [_inside(archive, name) for name, *_ in entries]
            wanted = set(inside) if members is None else {PurePosixPath(member) for member in members}
            for absent in sorted(wanted - set(inside)):
                raise UserError(f'{archive} has no {absent}')
            result = []
            chosen = [(path, *entry[1:]) for path, entry in zip(inside, entries) if path in wanted]
            needed = sum(size for path, size, _ in chosen if not _is_whole(folder / path, size))
            place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
            if needed > (free := shutil.disk_usage(place).free):
                there = f'it needs {_amount(needed)}, the disk has {_amount(free)} free'
                raise UserError(f'cannot unpack {archive} to {folder}: {there}')
            for path, size, open_member in tqdm(chosen, archive.name, disable=not progress, unit='file'):
                target = folder / path
                if not _is_whole(target, size):
                    _extract(open_member, target)
                result.append(target)
            return result
    except _DAMAGED as error:
        raise UserError(f'{archive} cannot be unpacked: {error or "it is damaged"}') from error
    except OSError as error:
        full = error.errno in _FULL
        place = error.filename or folder
        raise UserError(
            f'cannot unpack {archive} to {place}: {"the disk is full" if full else error.strerror or error}'
        ) from error


@contextlib.contextmanager
def _opened(archive):
    """(name, size, function that opens it) of each file in an archive."""
    if not archive.is_file():
        raise UserError(f'{archive} is {"a folder" if archive.is_dir() else "not there"}; expected an archive')
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield list(_bounded(archive, (_zip_entry(archive, file, info) for info in file.infolist())))
        return
    try:
        file = tarfile.open(archive, tarinfo=type('_Header', (_Header,), {'archive': archive}))
    except tarfile.ReadError as error:
        raise UserError(f'{archive} is no zip or tar file, or damaged') from error
    with file:
        # One by one: to reach the next header is to unpack what is before it.
        yield list(_bounded(archive, (_tar_entry(archive, file, info) for info in file)))


class _Header(tarfile.TarInfo):
    """A header of a tar file, refused where its name or attributes, which are read at once, would fill the memory."""

    archive: Path

    @classmethod
    def frombuf(cls, *args, **kwargs):
        header = super().frombuf(*args, **kwargs)
        if not header.isreg() and not header.isdir() and header.size > _LONGEST:
            raise UserError(f'{cls.archive} is refused: a header claims {_amount(header.size)} of attributes')
        return header


def _bounded(archive, entries):
    """The entries, until they claim more than an archive of images or weights unpacks to."""
    size, total = archive.stat().st_size, 0
    for entry in entries:
        total += entry[1] if entry is not None else 0
        if total > _RATIO * size + _FREE:
            raise UserError(f'{archive} is refused: its {_amount(size)} unpack to {_amount(total)} or more')
        yield entry


def _is_whole(target, size):
    return target.is_file() and target.stat().st_size == size


def _zip_entry(archive, file, info):
    if info.is_dir():
        return None
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise UserError(f'{archive} is refused: {info.filename} is a link or a device')
    return info.filename, info.file_size, lambda: file.open(info)


def _tar_entry(archive, file, info):
    if info.isdir():
        _inside(archive, info.name)
        return None
    if not info.isreg():
        raise UserError(f'{archive} is refused: {info.name} is a link or a device')
    return info.name, info.size, lambda: file.extractfile(info)


def _inside(archive, name):
    """The path of an entry, if it lies inside the folder on any system."""
    windows, path = PureWindowsPath(name), PurePosixPath(name.replace('\\', '/'))
    if windows.drive or windows.root or path.is_absolute() or '..' in path.parts or not path.parts:
        raise UserError(f'{archive} is refused: {name} would lie outside the folder')
    return path


def _extract(open_member, target):
    temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_member() as source, open(temporary, 'wb') as file:
            shutil.copyfileobj(source, file, _CHUNK)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
