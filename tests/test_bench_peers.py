"""The comparison with other libraries' optimizers, without the libraries."""

import io
from importlib.metadata import version
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.codec import closed_loop as codec
from benchmarks.codec import formats, peers

STEPS = codec.FIRST + codec.CHUNK
SECONDS = {"seconds_per_step": None}


@pytest.fixture(scope="module")
def stream():
    return {"w": np.random.default_rng(0).standard_normal((STEPS, 8, 16)).astype(np.float32)}


@pytest.fixture(scope="module")
def exact(stream):
    return codec.exact_adam(stream)["u"]


def adam(params):
    tx = optax.scale_by_adam(formats.B1, formats.B2, formats.EPS)
    return peers.Jax(tx.init(params), lambda state, g, t: tx.update(g, state))


def item(make=adam, kind="library", packages=("jax",), name="x"):
    return peers.Contender(name, kind, make, packages)


def test_float32_adam_is_exact(stream, exact):
    row = peers.run(item(), stream, exact)
    assert row["status"] == "measured"
    assert row["error"] < 1e-9
    assert row["state_bytes"] == 2 * 4 * 128 + 4
    assert row["bits"] == 32
    assert row["versions"]["jax"] == version("jax")
    assert row["seconds_per_step"] > 0
    assert peers.run(item(), stream, exact, timed=False)["seconds_per_step"] is None


def test_error_is_that_of_codec(stream, exact):
    """The same format, in the loop of `benchmarks.codec.closed_loop` and in this one."""
    named = next(x for x in formats.PEERS if x.name == "FlashOptim 8-bit")
    params = {"w": jnp.zeros((8, 16))}
    loop = codec.Peer(named)
    steps = {"g": stream, **codec.exact_adam(stream)}
    there = codec.measure(loop, loop.init(params), steps)["error"]
    assert np.isclose(peers.measure(peers._reference(named, params), stream, exact)["error"], there)


def test_no_update_is_an_error_of_one(stream, exact):
    def idle(params):
        return peers.Jax(params, lambda state, g, t: (jax.tree.map(jnp.zeros_like, g), state))

    assert peers.run(item(idle), stream, exact)["error"] == 1


def test_not_finite(stream, exact):
    def broken(params):
        return peers.Jax(params, lambda state, g, t: (jax.tree.map(lambda x: x / 0, g), state))

    assert "not finite" in peers.run(item(broken), stream, exact)["status"]
    with pytest.raises(FloatingPointError):  # ours does not fail silently
        peers.run(item(broken, kind="ours"), stream, exact)


def test_not_installed(stream, exact):
    row = peers.run(item(packages=("no-such-package",)), stream, exact)
    assert row == {"status": "not installed: no-such-package"}


def test_a_lacking_library_keeps_its_row(stream, monkeypatch, tmp_path, capsys):
    """What lacks gets a row, but not over one that was measured where it did not."""
    out = tmp_path / "peers.json"
    argv = ["peers", "--streams", "gpt", "--json", str(out), "--plot", str(tmp_path / "peers.png")]
    monkeypatch.setattr(peers.streams, "load", lambda *args, **kwargs: stream)
    ours, lacking = item(kind="ours", name="ours"), item(packages=("no-such-package",))

    def main(items, *more):
        monkeypatch.setattr(peers, "contenders", lambda: items)
        monkeypatch.setattr("sys.argv", [*argv, "--min-size", "1", *more])
        peers.main()
        return {row["name"]: row for row in _io.read_json(out)["results"]}

    rows = main([ours, lacking], "--untimed")
    assert rows["x"]["status"] == "not installed: no-such-package"
    assert rows["ours"]["seconds_per_step"] is None
    assert "not installed" in capsys.readouterr().out
    rows = main([ours, item()])  # now it is there, and ours gets its seconds
    assert rows["x"]["status"] == "measured"
    assert rows["ours"]["seconds_per_step"] > 0
    again = main([ours, lacking], "--again", "--only", "x")
    assert again["x"] == rows["x"]
    assert (tmp_path / "peers.png").exists()


def test_torch_parts():
    """A tensor made of several counts part by part, and a table that leaves share once."""
    table = np.zeros(256, np.float32)
    packed = SimpleNamespace(
        tensor_attrs=["codes", "qmap"], codes=np.zeros(8, np.uint8), qmap=np.zeros(16, np.float32)
    )
    states = [
        {"step": 3, "state1": np.zeros(100, np.uint8), "qmap1": table},
        {"step": 3, "state1": np.zeros(50, np.uint8), "qmap1": table},
        {"exp_avg": packed},
    ]
    want = [("codes", 8), ("qmap", 64), ("qmap1", 1024), ("state1", 50), ("state1", 100)]
    assert sorted(peers.torch_parts(states)) == want


def test_contenders():
    items = peers.contenders()
    names, known = [x.name for x in items], {x.name for x in formats.PEERS}
    assert len(set(names)) == len(names)
    assert {x.format for x in items} <= known | {None}
    assert all(f"reference {x.format}" in names for x in items if x.format)


def test_ours_holds_what_is_counted():
    params = {"w": jnp.zeros((64, 128))}
    loop = peers._ours(stquant.Fixed(5, 4), params)
    assert sum(size for _, size in loop.parts()) == sum(
        x.nbytes for x in jax.tree.leaves(loop.state)
    )


def row(name, kind, bits, error, **more):
    about = {"stream": "gpt", "name": name, "kind": kind, "status": "measured", "format": None}
    return about | {"bits": bits, "bits_held": bits, "error": error, **SECONDS} | more


def test_standing():
    """The best of ours among those whose whole state fits in the library's codes and scales."""
    rows = [
        row("theirs", "library", 4.25, 0.5, format="them"),
        row("reference them", "reference", 4.25, 0.4),
        row("small", "ours", 2.0, 0.3),
        row("fits", "ours", 4.25, 0.1),
        row("just not", "ours", 4.2, 0.01, bits_held=4.26),
        row("tiny", "library", 1.0, 2.0),
        {"stream": "gpt", "name": "y", "kind": "library", "status": "not installed: y"},
    ]
    found = {p["library"]["name"]: p["ours"] for p in peers.standing(rows, "gpt")}
    assert found["theirs"]["name"] == "fits"
    assert found["tiny"] is None
    (pair,) = peers.agreement(rows, "gpt")
    assert (pair["library"]["error"], pair["reference"]["error"]) == (0.5, 0.4)


def test_show_has_whole_names():
    """Brackets are no markup."""
    rows = [row("theirs, [out, in]", "library", 4.25, 0.5), row("fits", "ours", 4.0, 0.1)]
    for table in peers.show(rows, "gpt")[:2]:
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(table)
        assert "theirs, [out, in]" in console.export_text()


def test_record():
    """The committed rows: those of a contender, measured or with the reason why not."""
    rows = _io.read_json(_io.RESULTS / "peers.json")["results"]
    names = {x.name for x in peers.contenders()}
    assert {x["name"] for x in rows} <= names
    assert len({(x["stream"], x["name"]) for x in rows}) == len(rows)
    for x in rows:
        assert x["status"] == "measured" or x["kind"] == "library"
        if x["status"] == "measured":
            assert 0 < x["error"] < 10
            assert {"python", "jax"} & x["versions"].keys() and x["date"]
