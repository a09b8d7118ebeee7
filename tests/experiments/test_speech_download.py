"""Fetching Speech Commands, from a server on this host, as the published address was out of reach."""

from __future__ import annotations

import hashlib
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from experiments.data import SpeechCommands, speech
from experiments.data.clips import WORDS, Archive, download, list_clips
from tests.helpers.clips import clip, write_wav


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    """An archive of the words' folders like the published one, behind a server on this host."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = tmp_path / "served" / "words.tar.gz"
    for word in WORDS:
        write_wav(path.parent / "words" / word / "bobby_nohash_0.wav", clip("sine", 10))
    with tarfile.open(path, "w:gz") as tar:
        tar.add(path.parent / "words", ".")
    serve = partial(SimpleHTTPRequestHandler, directory=str(path.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/{path.name}"
        yield Archive(address, hashlib.md5(path.read_bytes()).hexdigest())
        server.shutdown()
        thread.join()


def test_an_archive_is_fetched_and_extracted_where_nothing_is(archive: Archive, tmp_path: Path) -> None:
    new = tmp_path / "data" / "speech_commands"
    download(new, archive)
    assert list_clips(new).labels == tuple(range(35))
    assert sorted(path.name for path in new.parent.iterdir()) == ["speech_commands", "words.tar.gz"]


def test_a_folder_that_has_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    download(tmp_path, Archive("http://127.0.0.1:1/never-asked.tar.gz", "0" * 32))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_another_archive_is_refused_and_nothing_is_extracted(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="corrupted"):
        download(tmp_path / "data" / "speech_commands", archive._replace(md5="0" * 32))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["words.tar.gz"]


def test_an_extraction_that_was_broken_off_is_done_again(archive: Archive, tmp_path: Path) -> None:
    left = tmp_path / "data" / "speech_commands.extracting" / "yes" / "half.wav"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"RIFF")
    download(tmp_path / "data" / "speech_commands", archive)
    assert not left.parent.parent.exists()
    assert not (tmp_path / "data" / "speech_commands" / "yes" / "half.wav").exists()


def test_the_data_module_fetches_first_if_told_to(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "download", partial(download, archive=archive))
    data = SpeechCommands(str(tmp_path / "new"), cache_dir=str(tmp_path / "cache"), download=True)
    data.check()
    with pytest.raises(ValueError, match=r"0 of 35 clips have 16000 samples"):
        data.prepare_data()
    assert len(data.listing.files) == 35
