"""fetch_data.py against a local server that breaks off, ignores ranges, sends something else, or is not there."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import fetch_data
from alpaca.common.errors import UserError

CONTENT = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def small_release(monkeypatch):
    """The release stands in the project by its size and hashes alone: here a small file has its place."""
    monkeypatch.setattr(fetch_data, "SIZE", len(CONTENT))
    monkeypatch.setattr(fetch_data, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    blob = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    monkeypatch.setattr(fetch_data, "GIT_BLOB", blob)
    monkeypatch.setattr(fetch_data.time, "sleep", lambda seconds: None)


@pytest.fixture
def server():
    """Serves `content`, at most `cut` bytes a request, in ranges where `ranges` is true."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            own = self.server
            own.ranges_asked.append(self.headers.get("Range"))
            start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") and own.ranges else 0
            self.send_response(own.status or (206 if start else 200))
            self.send_header("Content-Type", own.content_type)
            self.send_header("Content-Length", str(len(own.content) - start))
            self.end_headers()
            self.wfile.write(own.content[start : start + own.cut])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as own:
        own.content, own.cut, own.ranges, own.status, own.ranges_asked = CONTENT, 10**9, True, None, []
        own.content_type = "text/plain"
        own.url = f"http://127.0.0.1:{own.server_address[1]}/alpaca_data.json"
        threading.Thread(target=own.serve_forever, args=(0.01,), daemon=True).start()
        yield own
        own.shutdown()


def test_a_download_goes_on_where_it_broke_off(tmp_path, server):
    server.cut = 40_000
    fetch_data.fetch(str(tmp_path), url=server.url)
    assert (tmp_path / "alpaca_data.json").read_bytes() == CONTENT
    assert server.ranges_asked == [None, "bytes=40000-", "bytes=80000-"]
    assert "NonCommercial" in (tmp_path / "LICENSE.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LICENSE.txt", "alpaca_data.json"]


def test_a_server_without_ranges(tmp_path, server):
    """Appending the whole file to the first half would have made a file of the wrong bytes."""
    (tmp_path / ".alpaca_data.json.partial").write_bytes(CONTENT[:1000])
    server.ranges = False
    fetch_data.fetch(str(tmp_path), url=server.url)
    assert (tmp_path / "alpaca_data.json").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": CONTENT[:-1] + b"x"}, "sha256"),
        ({"content": CONTENT + b"more"}, "bytes where the release has"),
        ({"content": b"<html>sign in</html>"}, "20 of 102,400 bytes"),
        ({"content": b"<html>sign in</html>", "content_type": "text/html; charset=utf-8"}, "is a web page"),
        ({"url": "alpaca_data.json"}, "begins with https://"),
        ({"status": 404}, "404"),
        ({"cut": 10}, "the same command goes on"),
    ],
)
def test_a_wrong_or_short_file_gets_no_name(tmp_path, server, change, message):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=message):
        fetch_data.fetch(str(tmp_path), url=server.url)
    assert not (tmp_path / "alpaca_data.json").exists()


def test_no_server_at_all(tmp_path):
    with pytest.raises(UserError, match="could not be downloaded(.|\n)*--from_file"):
        fetch_data.fetch(str(tmp_path), url="http://127.0.0.1:9/x", timeout=5)


def test_a_copy_from_another_machine(tmp_path):
    (tmp_path / "copy.json").write_bytes(CONTENT)
    fetch_data.fetch(str(tmp_path / "out"), from_file=str(tmp_path / "copy.json"))
    assert (tmp_path / "out/alpaca_data.json").read_bytes() == CONTENT
    (tmp_path / "short.json").write_bytes(CONTENT[:-5])
    with pytest.raises(UserError, match=r"short.json: 102,395 bytes .* left where it is"):
        fetch_data.fetch(str(tmp_path / "other"), from_file=str(tmp_path / "short.json"))
    assert not list((tmp_path / "other").iterdir())
    assert (tmp_path / "short.json").is_file()


def test_another_file_of_that_name_is_left_alone(tmp_path, server):
    (tmp_path / "alpaca_data.json").write_text("mine")
    with pytest.raises(UserError, match="--overwrite True"):
        fetch_data.fetch(str(tmp_path), url=server.url)
    assert (tmp_path / "alpaca_data.json").read_text() == "mine"
    fetch_data.fetch(str(tmp_path), url=server.url, overwrite=True)
    fetch_data.fetch(str(tmp_path), url="http://127.0.0.1:9/x")  # the release is there: nothing is asked
