"""Downloads from a server of our own that cuts, refuses, lies and stalls: the target is whole, or it is not there."""

import errno
import hashlib
import http.server
import io
import multiprocessing
import os
import re
import shutil
import stat
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from dckd_sr import download
from dckd_sr.errors import UserError

DATA = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.data`` with ranges; ``server.faults`` holds what goes wrong at the next requests."""

    def do_GET(self):
        server, fault = self.server, self.server.faults.pop(0) if self.server.faults else {}
        server.requests.append(dict(self.headers))
        time.sleep(fault.get('wait', 0))
        data, status, start = server.data, fault.get('status', 200), 0
        asked = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if asked and status == 200 and self.headers.get('If-Range', server.etag) == server.etag:
            start = int(asked[1])
            status = 206 if start < len(data) else 416
        self.send_response(status)
        if status == 206:
            self.send_header('Content-Range', f'bytes {fault.get("from", start)}-{len(data) - 1}/{len(data)}')
        if status == 416:
            self.send_header('Content-Range', f'bytes */{len(data)}')
        if status == 302:
            self.send_header('Location', fault['to'])
        body = data[start:] if status in (200, 206) else b''
        if server.etag:
            self.send_header('ETag', server.etag)
        if fault.get('length', True):
            self.send_header('Content-Length', str(len(body)))
        self.send_header('Content-Type', fault.get('type', 'application/octet-stream'))
        self.end_headers()
        self.wfile.write(body[: fault.get('cut')])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, 'PAUSE', 0.01)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.data, server.etag, server.faults, server.requests = DATA, '"v1"', [], []
    server.url = f'http://127.0.0.1:{server.server_port}/weights.pth'
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def files():
    return sorted(path.as_posix() for path in Path().rglob('*') if path.is_file())


def test_a_file_arrives_whole(server, capsys):
    path = download.fetch(server.url, 'new/folder/weights.pth', SHA)
    assert path == Path('new/folder/weights.pth') and path.read_bytes() == DATA
    assert files() == ['new/folder/weights.pth']
    assert 'weights.pth: 100%' in capsys.readouterr().err
    assert 'Range' not in server.requests[0]
    download.fetch(server.url, path, SHA[:8].upper())
    assert len(server.requests) == 1  # it is there, and it is the one


@pytest.mark.parametrize('quiet', [True, False])
def test_no_bar_if_not_wanted(server, capsys, quiet):
    download.fetch(server.url, 'a.pth', progress=not quiet)
    assert (capsys.readouterr().err == '') == quiet


def test_another_file_in_its_place_is_kept(server):
    Path('a.pth').write_text('precious')
    with pytest.raises(UserError, match='a.pth is there with sha256 .*; delete it or name another folder'):
        download.fetch(server.url, 'a.pth', SHA)
    assert Path('a.pth').read_text() == 'precious' and server.requests == []


def test_a_cut_transfer_goes_on_where_it_ended(server):
    server.faults = [{'cut': 300000}, {'cut': 200000}]
    download.fetch(server.url, 'a.pth', SHA, progress=False)
    assert [request.get('Range') for request in server.requests] == [None, 'bytes=300000-', 'bytes=500000-']
    assert [request.get('If-Range') for request in server.requests] == [None, '"v1"', '"v1"']
    assert files() == ['a.pth']


def test_a_later_run_goes_on(server):
    server.faults = [{'cut': 300000}, {'cut': 0}, {'cut': 0}]
    with pytest.raises(
        UserError, match=r'ended after 293kB of 1.00MB; 293kB are kept, the next run continues'
    ) as error:
        download.fetch(server.url, 'a.pth', SHA, progress=False)
    assert '\n' not in str(error.value) and not Path('a.pth').exists()
    assert Path('a.pth.part').read_bytes() == DATA[:300000]
    server.requests.clear()
    assert download.fetch(server.url, 'a.pth', SHA, progress=False).read_bytes() == DATA
    assert [request.get('Range') for request in server.requests] == ['bytes=300000-']
    assert files() == ['a.pth']


def test_what_changed_on_the_server_starts_anew(server):
    server.faults = [{'cut': 300000}, {'cut': 0}, {'cut': 0}]
    with pytest.raises(UserError, match='ended after'):
        download.fetch(server.url, 'a.pth', progress=False)
    server.data, server.etag = DATA[::-1], '"v2"'
    assert download.fetch(server.url, 'a.pth', progress=False).read_bytes() == DATA[::-1]


@pytest.mark.parametrize('sha256', [None, SHA])
def test_servers_without_validator(server, sha256):
    """Nothing says that both halves are of one file: only a hash makes it safe to continue."""
    server.etag = None
    server.faults = [{'cut': 300000}]
    assert download.fetch(server.url, 'a.pth', sha256, progress=False).read_bytes() == DATA
    assert server.requests[1].get('Range') == (None if sha256 is None else 'bytes=300000-')


def test_leftovers_of_another_file_are_found_by_the_hash(server):
    server.etag = None
    Path('a.pth.part').write_bytes(b'x' * 1000)
    assert download.fetch(server.url, 'a.pth', SHA, progress=False).read_bytes() == DATA
    assert [request.get('Range') for request in server.requests] == ['bytes=1000-', None]


def test_a_complete_part_needs_no_transfer(server):
    Path('a.pth.part').write_bytes(DATA)
    assert download.fetch(server.url, 'a.pth', SHA, progress=False).read_bytes() == DATA
    assert files() == ['a.pth']


def test_a_part_that_is_too_long_starts_anew(server):
    Path('a.pth.part').write_bytes(DATA + b'x')
    assert download.fetch(server.url, 'a.pth', SHA, progress=False).read_bytes() == DATA


def test_a_range_from_elsewhere_is_not_appended(server):
    Path('a.pth.part').write_bytes(DATA[:1000])
    server.faults = [{'from': 5}]
    assert download.fetch(server.url, 'a.pth', SHA, progress=False).read_bytes() == DATA
    assert [request.get('Range') for request in server.requests] == ['bytes=1000-', None]


@pytest.mark.parametrize('leftover', [b'', b'x' * 10])
def test_a_wrong_hash_leaves_nothing(server, leftover):
    if leftover:
        Path('a.pth.part').write_bytes(leftover)
    wrong = 'f' * 64
    with pytest.raises(UserError) as error:
        download.fetch(server.url, 'a.pth', wrong, progress=False)
    assert str(error.value) == f'{server.url}: the file has sha256 {SHA}, expected {wrong}; it was removed'
    assert files() == []


@pytest.mark.parametrize(
    'fault, message',
    [
        ({'status': 404}, r'not found \(HTTP 404\)'),
        ({'status': 410}, r'not found any more \(HTTP 410\)'),
        ({'status': 403}, r'refused \(HTTP 403\)'),
        ({'type': 'text/html; charset=utf-8'}, 'a web page instead of the file'),
        ({'status': 302, 'to': 'http://example.com/weights.pth'}, 'only https'),
        ({'status': 302, 'to': 'file:///etc/hostname'}, r'failed \(HTTP 302\)'),
    ],
)
def test_refusals_are_said_once_and_leave_nothing(server, fault, message):
    server.faults = [fault]
    with pytest.raises(UserError, match=message) as error:
        download.fetch(server.url, 'folder/a.pth', SHA, progress=False)
    assert '\n' not in str(error.value) and 'http' in str(error.value)
    assert files() == [] and len(server.requests) == 1


def test_a_busy_server_is_asked_again(server):
    server.faults = [{'status': 503}, {'status': 503}]
    assert download.fetch(server.url, 'a.pth', SHA, progress=False).read_bytes() == DATA
    server.faults = [{'status': 500}] * 3
    with pytest.raises(UserError, match=r'the server fails \(HTTP 500'):
        download.fetch(server.url, 'b.pth', SHA, progress=False)
    assert files() == ['a.pth']


def test_a_redirect_is_followed(server):
    server.faults = [{'status': 302, 'to': '/elsewhere.pth'}]
    assert download.fetch(server.url, 'a.pth', SHA, progress=False).read_bytes() == DATA


def test_a_silent_server(server, monkeypatch):
    monkeypatch.setattr(download, 'TIMEOUT', 0.05)
    server.faults = [{'wait': 0.3}] * 3
    with pytest.raises(UserError, match='no answer within 0.05 s'):
        download.fetch(server.url, 'a.pth', SHA, progress=False)
    assert files() == []


def test_no_server(monkeypatch):
    monkeypatch.setattr(download, 'PAUSE', 0)
    with pytest.raises(UserError, match=r'no connection \(Connection refused\)'):
        download.fetch('http://127.0.0.1:9/a.pth', 'a.pth', SHA, progress=False)
    assert files() == []


def test_no_network(monkeypatch):
    def lookup(*_, **__):
        raise download.socket.gaierror(-3, 'Temporary failure in name resolution')

    monkeypatch.setattr(download, 'PAUSE', 0)
    monkeypatch.setattr(download.socket, 'getaddrinfo', lookup)
    with pytest.raises(UserError, match=r'^https://example.com/a.pth: no such host; is there a network\?$'):
        download.fetch('https://example.com/a.pth', 'a.pth', SHA, progress=False)
    assert files() == []


@pytest.mark.parametrize('url', ['http://example.com/a', 'ftp://127.0.0.1/a', 'file:///etc/hostname', 'a.pth'])
def test_only_https_leaves_this_machine(url):
    with pytest.raises(UserError, match='only https'):
        download.fetch(url, 'a.pth')


@pytest.mark.parametrize('sha256', ['1234567', 'xyz' * 5])
def test_a_hash_is_one(server, sha256):
    with pytest.raises(ValueError, match='no hash'):
        download.fetch(server.url, 'a.pth', sha256)


def test_the_size_is_checked_first(server):
    with pytest.raises(UserError, match=f'{len(DATA)} bytes, expected 17'):
        download.fetch(server.url, 'a.pth', size=17, progress=False)
    assert files() == []
    server.faults = [{'length': False, 'cut': 1000}]  # an end that only the known size tells to be early
    assert download.fetch(server.url, 'a.pth', size=len(DATA), progress=False).read_bytes() == DATA


def test_a_disk_with_too_little_room(server, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(1, 1, 1000))
    with pytest.raises(UserError, match=r'cannot write a.pth: it needs 1.00MB, the disk has 0.98kB free'):
        download.fetch(server.url, 'a.pth', SHA, progress=False)
    assert files() == []


def test_a_disk_that_fills_up(server, monkeypatch):
    class Full(io.FileIO):
        def write(self, block):
            if self.tell():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(block)

    real = open
    monkeypatch.setattr(download, '_CHUNK', 2**18)
    monkeypatch.setattr(
        download, 'open', lambda path, mode: Full(path, 'w') if mode == 'wb' else real(path, mode), raising=False
    )
    with pytest.raises(UserError, match=r'^cannot write a.pth: the disk is full \(it needs 1.00MB\)$'):
        download.fetch(server.url, 'a.pth', SHA, progress=False)
    assert files() == []


def test_a_folder_that_cannot_be_written(server):
    Path('file').touch()
    with pytest.raises(UserError, match='cannot write file/a.pth'):
        download.fetch(server.url, 'file/a.pth', SHA, progress=False)
    Path('a.pth').mkdir()
    with pytest.raises(UserError, match='a.pth is a folder'):
        download.fetch(server.url, 'a.pth', SHA, progress=False)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='starts processes by fork')
def test_two_processes_want_the_same_file(server):
    """The second waits for the first: one transfer, one file."""
    server.faults = [{'wait': 0.3}]
    fork = multiprocessing.get_context('fork')
    arguments = (server.url, 'a.pth', SHA, None, False)
    processes = [fork.Process(target=download.fetch, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert Path('a.pth').read_bytes() == DATA and files() == ['a.pth']
    assert len(server.requests) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def make_zip(path, **members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def make_tar(path, *infos, mode='w:gz'):
    with tarfile.open(path, mode) as file:
        for info in infos:
            file.addfile(info, io.BytesIO(b'x' * info.size))
    return path


def entry(name, kind=tarfile.REGTYPE, size=0, target=''):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


def test_unpack_zip():
    make_zip('a.zip', **{'d/one.txt': 'one', 'd/e/two.txt': 'two', 'empty/': ''})
    paths = download.unpack('a.zip', 'out', progress=False)
    assert paths == [Path('out/d/one.txt'), Path('out/d/e/two.txt')]
    assert [path.read_text() for path in paths] == ['one', 'two']
    assert files() == ['a.zip', 'out/d/e/two.txt', 'out/d/one.txt']


@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:xz'])
def test_unpack_tar(mode):
    make_tar('a.tar', entry('d', tarfile.DIRTYPE), entry('./d/one', size=3), entry('two', size=5), mode=mode)
    assert download.unpack('a.tar', 'out', progress=False) == [Path('out/d/one'), Path('out/two')]
    assert Path('out/two').read_bytes() == b'xxxxx'


def test_unpack_some():
    make_zip('a.zip', **{'d/one.txt': 'one', 'd/two.txt': 'two'})
    assert download.unpack('a.zip', 'out', ['d/two.txt'], progress=False) == [Path('out/d/two.txt')]
    assert files() == ['a.zip', 'out/d/two.txt']
    with pytest.raises(UserError, match='a.zip has no three.txt'):
        download.unpack('a.zip', 'out', ['three.txt'], progress=False)


def test_unpack_goes_on():
    make_zip('a.zip', one='right', two='two')
    Path('out').mkdir()
    Path('out/one').write_text('wrong')  # of the right size: taken for the file
    Path('out/two').write_text('half of it')
    download.unpack('a.zip', 'out', progress=False)
    assert Path('out/one').read_text() == 'wrong' and Path('out/two').read_text() == 'two'


@pytest.mark.parametrize(
    'name', ['../evil', 'a/../../evil', '/evil', '..\\evil', 'C:\\evil', 'C:evil', '\\\\host\\share\\evil', '.']
)
@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_entries_outside_are_refused_before_anything_is_written(name, kind):
    if kind == 'zip':
        make_zip('archive', **{'fine': 'fine', name: 'evil'})
    else:
        make_tar('archive', entry('fine', size=1), entry(name, size=1))
    with pytest.raises(UserError, match='would lie outside the folder'):
        download.unpack('archive', 'out', progress=False)
    assert files() == ['archive']


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind):
    make_tar('a.tar', entry('fine', size=1), entry('link', kind, target='/etc/hostname'))
    with pytest.raises(UserError, match='link is a link or a device'):
        download.unpack('a.tar', 'out', progress=False)
    assert files() == ['a.tar']


def test_zip_links_are_refused():
    info = zipfile.ZipInfo('link')
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile('a.zip', 'w') as file:
        file.writestr(info, '/etc/hostname')
    with pytest.raises(UserError, match='link is a link or a device'):
        download.unpack('a.zip', 'out', progress=False)


@pytest.mark.parametrize('kind', ['zip', 'w:gz', 'w:bz2'])
def test_archives_that_unpack_to_far_more_than_they_are_are_refused(kind, monkeypatch):
    """Found in the table of a zip file; of a tar file before more of it is unpacked than the bound."""
    monkeypatch.setattr(download, '_FREE', 1000)
    if kind == 'zip':
        make_zip('archive', **{f'{i}.txt': 'x' * 100_000 for i in range(20)})
    else:
        make_tar('archive', *(entry(f'{i}.txt', size=100_000) for i in range(20)), mode=kind)
    size = Path('archive').stat().st_size
    with pytest.raises(UserError, match=r'archive is refused: its \S+ unpack to \S+ or more'):
        download.unpack('archive', 'out', progress=False)
    assert files() == ['archive'] and size < 20_000


def test_a_disk_without_room_is_told_before_anything_is_written(monkeypatch):
    make_zip('a.zip', one='1' * 50, two='2' * 50)
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda path: SimpleNamespace(free=60))
    with pytest.raises(UserError, match='cannot unpack a.zip to out/deep: it needs 100B, the disk has 60.0B free'):
        download.unpack('a.zip', 'out/deep', progress=False)
    assert files() == ['a.zip']
    download.unpack('a.zip', 'out', ['one'], progress=False)
    download.unpack('a.zip', 'out', progress=False)  # needs the other one alone


def test_tar_headers_that_would_fill_the_memory_are_refused():
    with tarfile.open('a.tar', 'w:gz', format=tarfile.PAX_FORMAT, pax_headers={'comment': 'x' * 2**21}) as file:
        file.addfile(entry('one', size=1), io.BytesIO(b'x'))
    with pytest.raises(UserError, match='a.tar is refused: a header claims .* of attributes'):
        download.unpack('a.tar', 'out', progress=False)
    info = entry('n' * 2**21, size=1)
    with tarfile.open('b.tar', 'w:gz', format=tarfile.GNU_FORMAT) as file:
        file.addfile(info, io.BytesIO(b'x'))
    with pytest.raises(UserError, match='claims .* of attributes'):
        download.unpack('b.tar', 'out', progress=False)


def test_damaged_archives():
    make_zip('a.zip', one=os.urandom(2000))
    content = bytearray(Path('a.zip').read_bytes())
    content[500] ^= 1
    Path('a.zip').write_bytes(content)
    make_tar('a.tar', entry('one', size=200000), mode='w')
    Path('a.tar').write_bytes(Path('a.tar').read_bytes()[:100000])
    Path('text').write_text('hello')
    before = files()
    for name in ('a.zip', 'a.tar', 'text', 'absent'):
        with pytest.raises(UserError, match=name) as error:
            download.unpack(name, 'out', progress=False)
        assert '\n' not in str(error.value)
    assert files() == before


def test_a_folder_that_cannot_hold_it():
    make_zip('a.zip', one='one')
    Path('out').touch()
    with pytest.raises(UserError, match='cannot unpack a.zip to out'):
        download.unpack('a.zip', 'out', progress=False)
