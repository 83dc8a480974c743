import hashlib
import socket
from pathlib import Path

import pytest

from octavo.errors import ResourceError
from octavo.text import download
from octavo.text.download import cache_dir, fetch

DATA = b"a text\n"
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def url(web):
    address, folder = web
    (folder / "text.txt").write_bytes(DATA)
    return address + "text.txt"


def downloads(cache: Path) -> list[str]:
    """What the cache holds besides the native engine."""
    return [path.name for path in cache.iterdir() if not path.name.startswith("native-")]


def test_a_download_is_kept_and_used_without_a_network(url, web, cache_dir):
    assert fetch("kept.txt", url, SHA256, "otherwise") == DATA
    (web[1] / "text.txt").unlink()
    assert fetch("kept.txt", url, SHA256, "otherwise") == DATA
    assert downloads(cache_dir) == ["kept.txt"]


def test_other_bytes_are_refused_and_not_kept(url, cache_dir):
    with pytest.raises(
        ResourceError, match=r"kept\.txt is damaged.*000000000000.*do this"
    ) as error:
        fetch("kept.txt", url, "0" * 64, "do this")
    assert error.value.exit_code == 6
    assert downloads(cache_dir) == []


def test_a_damaged_cache_is_replaced(url, cache_dir):
    (cache_dir / "kept.txt").write_bytes(DATA[:-1])
    assert fetch("kept.txt", url, SHA256, "otherwise") == DATA
    assert (cache_dir / "kept.txt").read_bytes() == DATA


def test_places_come_before_the_network(tmp_path, no_network):
    (tmp_path / "wrong").write_bytes(b"another")
    (tmp_path / "right").write_bytes(DATA)
    places = [tmp_path / "missing", tmp_path / "wrong", tmp_path / "right"]
    assert fetch("kept.txt", "http://nowhere/", SHA256, "otherwise", places) == DATA


def test_a_cache_that_cannot_be_written_does_not_matter(url, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "file" / "below"))
    assert fetch("kept.txt", url, SHA256, "otherwise") == DATA


def test_no_network_names_the_way_out(no_network):
    with pytest.raises(ResourceError, match=r"kept\.txt: Network is unreachable.*do this"):
        fetch("kept.txt", "http://nowhere/text.txt", SHA256, "do this")


def test_a_page_that_is_not_there(url):
    with pytest.raises(ResourceError, match="File not found"):
        fetch("kept.txt", url + "x", SHA256, "otherwise")


def test_a_silent_server_is_not_waited_for(monkeypatch):
    """It accepts the connection and never says a word."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        with pytest.raises(ResourceError, match="timed out"):
            fetch("kept.txt", url, SHA256, "otherwise")


def test_where_downloads_are_kept(monkeypatch, tmp_path):
    assert cache_dir() == Path(download.os.environ["OCTAVO_CACHE"])
    monkeypatch.delenv("OCTAVO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "octavo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "octavo"
