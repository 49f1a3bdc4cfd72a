"""Fetching models, over real HTTP from a local server that speaks the Hub's protocol."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import save, save_file
from support.hub_server import FakeHub, serve
from support.models import TINY, random_state

from xmag.encoder import load_model
from xmag.errors import HubError, InputError, WeightsError
from xmag.hub.configs import given_config, resolve_config
from xmag.hub.fetch import locate_model
from xmag.hub.registry import DEFAULT_MODEL, KNOWN, SCHEMA, ModelConfig
from xmag.vit import CONFIGS

NAME = "someone/tiny"
WEIGHTS = save(random_state(TINY))
CONFIG = json.dumps({"format": SCHEMA, "name": NAME, **ModelConfig(vit=TINY).to_dict()}).encode()
FILES = {"README.md": b"# tiny", "config.json": CONFIG, "model.safetensors": WEIGHTS}


def _point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which huggingface_hub reads once, at its import."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # older versions hold a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve(FakeHub(repos={NAME: dict(FILES)})) as running:
        _point_to(running.url, monkeypatch)
        yield running


def _downloads(hub: FakeHub) -> list[str]:
    return [request.rsplit("/", 1)[-1] for request in hub.requests if "GET /someone" in request]


def test_the_first_fetch_loads_the_model_and_records_the_commit(
    hub: FakeHub, tmp_path: Path
) -> None:
    encoder = load_model(NAME, cache_dir=tmp_path, device="cpu")
    assert torch.equal(encoder.vit.norm.weight, random_state(TINY)["norm.weight"])
    assert encoder.provenance["revision"] == hub.commit
    assert encoder.provenance["name"] == NAME
    assert encoder.provenance["config_source"] == "read"
    # config before weights: a snapshot that has weights is whole; and nothing else is fetched
    assert _downloads(hub) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("revision", [None, "c" * 40])
def test_the_second_time_makes_no_request(
    hub: FakeHub, tmp_path: Path, revision: str | None
) -> None:
    first = locate_model(NAME, revision=revision, cache_dir=tmp_path)
    hub.requests.clear()
    assert locate_model(NAME, revision=revision, cache_dir=tmp_path) == first
    assert hub.requests == []


def test_a_branch_is_looked_up_again_as_it_may_have_moved(hub: FakeHub, tmp_path: Path) -> None:
    locate_model(NAME, revision="main", cache_dir=tmp_path)
    hub.commit = "d" * 40
    hub.repos[NAME]["model.safetensors"] = save(random_state(TINY, seed=1))
    assert locate_model(NAME, cache_dir=tmp_path).revision == "c" * 40
    assert locate_model(NAME, revision="main", cache_dir=tmp_path).revision == "d" * 40


def test_a_tag_is_resolved_to_its_commit(hub: FakeHub, tmp_path: Path) -> None:
    assert locate_model(NAME, revision="v1", cache_dir=tmp_path).revision == hub.commit


def test_local_files_only_takes_what_is_cached_and_asks_nobody(
    hub: FakeHub, tmp_path: Path
) -> None:
    with pytest.raises(HubError, match=r"local_files_only=True.*xmag-mini"):
        locate_model(NAME, cache_dir=tmp_path, local_files_only=True)
    assert hub.requests == []
    fetched = locate_model(NAME, cache_dir=tmp_path)
    hub.requests.clear()
    assert locate_model(NAME, cache_dir=tmp_path, local_files_only=True) == fetched
    assert hub.requests == []


def test_a_connection_cut_once_is_resumed(hub: FakeHub, tmp_path: Path) -> None:
    del hub.repos[NAME]["config.json"]
    hub.cut_body_after, hub.cuts = 1000, 1
    try:
        found = locate_model(NAME, cache_dir=tmp_path)
    except HubError:  # huggingface_hub 0.x leaves the rest to the next call
        found = locate_model(NAME, cache_dir=tmp_path)
    assert found.weights.read_bytes() == WEIGHTS
    assert _downloads(hub).count("model.safetensors") == 2


def test_a_connection_cut_for_good_leaves_no_half_file(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits between its tries
    del hub.repos[NAME]["config.json"]
    hub.cut_body_after, hub.cuts = 0, 1000
    with pytest.raises(HubError, match=r"cannot be fetched.*cache"):
        locate_model(NAME, cache_dir=tmp_path)
    with pytest.raises(HubError, match="not in the cache"):
        locate_model(NAME, cache_dir=tmp_path, local_files_only=True)
    hub.cuts = 0
    assert locate_model(NAME, cache_dir=tmp_path).weights.read_bytes() == WEIGHTS


def test_a_gated_model_names_the_page_and_the_token(hub: FakeHub, tmp_path: Path) -> None:
    hub.gated[NAME] = "hf_right"
    remedy = rf"gated.*{hub.url}/{NAME}.*HF_TOKEN.*token="
    with pytest.raises(HubError, match=remedy):  # 401
        locate_model(NAME, cache_dir=tmp_path, token=False)
    with pytest.raises(HubError, match=remedy):  # 403
        locate_model(NAME, cache_dir=tmp_path, token="hf_wrong")
    assert locate_model(NAME, cache_dir=tmp_path, token="hf_right").revision == hub.commit


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_without_a_reason_names_the_page_too(
    hub: FakeHub, tmp_path: Path, status: int
) -> None:
    hub.status = status
    with pytest.raises(HubError, match=rf"(HTTP {status}|not found).*HF_TOKEN"):
        locate_model(NAME, cache_dir=tmp_path)


def test_an_unknown_repository_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"someone/typo was not found.*spelling.*HF_TOKEN"):
        locate_model("someone/typo", cache_dir=tmp_path)


def test_a_file_that_vanished_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.status = 404
    with pytest.raises(HubError, match=r"lists a file that it does not have"):
        locate_model(NAME, cache_dir=tmp_path)


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_server_in_trouble_is_reported(
    hub: FakeHub, tmp_path: Path, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits between its tries
    hub.status = 500
    with pytest.raises(HubError, match=r"cannot be fetched.*500"):
        locate_model(NAME, revision=revision, cache_dir=tmp_path)


def test_an_unknown_revision_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"no revision 'v9'"):
        locate_model(NAME, revision="v9", cache_dir=tmp_path)


def test_no_network_names_the_mini_model_and_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        _point_to(f"http://127.0.0.1:{unused.getsockname()[1]}", monkeypatch)
        with pytest.raises(HubError, match=rf"{tmp_path}.*xmag-mini.*no\s+network"):
            locate_model(NAME, cache_dir=tmp_path)


def test_without_a_network_the_cache_serves_a_branch_and_says_so(
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fetched = locate_model(NAME, cache_dir=tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        _point_to(f"http://127.0.0.1:{unused.getsockname()[1]}", monkeypatch)
        assert locate_model(NAME, revision="main", cache_dir=tmp_path) == fetched
    assert "cannot be reached" in caplog.text


def test_terms_are_logged_once_a_download(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "xmag")
    hub.repos["MahmoodLab/UNI2-h"] = dict(FILES)
    for _ in range(2):
        locate_model("MahmoodLab/UNI2-h", cache_dir=tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("xmag")]
    assert len(said) == 1
    assert "CC-BY-NC-ND" in said[0]


def test_pickles_are_fetched_only_where_there_is_nothing_better(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.repos[NAME]["pytorch_model.bin"] = b"a pickle"
    assert locate_model(NAME, cache_dir=tmp_path).weights.name == "model.safetensors"
    hub.repos["someone/old"] = {"pytorch_model.bin": b"a pickle", "optimizer.pt": b"more"}
    assert locate_model("someone/old", cache_dir=tmp_path).weights.name == "pytorch_model.bin"


def test_a_repository_without_weights_lists_what_it_has(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos[NAME] = {"README.md": b"soon"}
    with pytest.raises(WeightsError, match=r"no weights.*README\.md"):
        locate_model(NAME, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "mine.safetensors", "pytorch_model.bin"])
def test_a_classifier_beside_an_encoder_is_not_its_weights(tmp_path: Path, name: str) -> None:
    for file in (name, "classifier.safetensors", "classifier.json"):
        (tmp_path / file).write_bytes(b"")
    assert locate_model(tmp_path).weights.name == name


def test_a_classifier_alone_is_no_encoder(tmp_path: Path) -> None:
    (tmp_path / "classifier.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no encoder.*MILClassifier\.load"):
        locate_model(tmp_path)


def test_sharded_weights_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos[NAME] = {f"model-{i}-of-2.safetensors": b"" for i in (1, 2)}
    with pytest.raises(WeightsError, match=r"several.*sharded"):
        locate_model(NAME, cache_dir=tmp_path)


def test_environment_variables_of_the_hub_are_honoured(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, in fresh interpreters."""
    hub.gated[NAME] = "hf_right"
    script = (
        "from xmag.encoder import load_model\n"
        f"print(load_model({NAME!r}, device='cpu').provenance['revision'])\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script],
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=False,
        )

    fetched = run(HF_TOKEN="hf_right")
    assert fetched.stdout.strip() == hub.commit, fetched.stderr
    assert (tmp_path / "hub").is_dir()
    shutil.rmtree(tmp_path)
    hub.requests.clear()
    offline = run(HF_HUB_OFFLINE="1")
    assert "HubError" in offline.stderr
    assert "xmag-mini" in offline.stderr
    assert hub.requests == []


def test_an_existing_path_beats_a_hub_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(NAME)
    folder.mkdir(parents=True)
    save_file(random_state(TINY), folder / "model.safetensors")
    found = locate_model(NAME)
    assert (found.weights, found.revision) == (folder / "model.safetensors", None)
    assert hub.requests == []


def test_the_mini_model_beats_an_existing_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("xmag-mini").mkdir()
    assert load_model("xmag-mini", device="cpu").provenance["name"] == "xmag-mini"


@pytest.mark.parametrize("name", ["no-such-thing", "a/b/c", "./weights.pth", "https://x/y", ""])
def test_what_is_neither_a_path_nor_a_name_is_refused(name: str, tmp_path: Path) -> None:
    if name:
        with pytest.raises(InputError, match=r"no existing path and no Hub name.*owner/model"):
            locate_model(name)
    else:
        with pytest.raises(WeightsError, match="no weights"):
            locate_model(tmp_path)


def test_a_name_that_the_hub_forbids_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no name that the Hub allows"):
        locate_model("some--one/tiny", cache_dir=tmp_path)


def test_a_revision_of_a_local_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="revision='main' was given for the local path"):
        locate_model(tmp_path, revision="main")


def _config_file(tmp_path: Path, values: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_the_registry_knows_the_default_model_and_its_teacher() -> None:
    xmag, uni = KNOWN[DEFAULT_MODEL], KNOWN["MahmoodLab/UNI2-h"]
    assert xmag.config.vit == CONFIGS["dinov2_vitb14"]
    assert (xmag.config.tile_spec.mpp, xmag.config.vit.position_rule) == (2.0, "offset")
    assert (uni.config.tile_spec.mpp, uni.config.vit.registers) == (0.5, 8)
    assert "Noncommercial" in xmag.terms


def test_a_known_name_needs_no_config_and_a_given_one_wins(tmp_path: Path) -> None:
    path = _config_file(tmp_path, {"model_type": "xmag", "auto_map": {"AutoModel": "code.py"}})
    assert resolve_config(DEFAULT_MODEL, path, None).source == "registry"
    given = resolve_config(DEFAULT_MODEL, path, given_config("dinov2_vits14"))
    assert (given.source, given.config.vit) == ("given", CONFIGS["dinov2_vits14"])


def test_a_bare_file_is_assumed_to_be_a_vit_b_and_says_so() -> None:
    resolved = resolve_config("weights.safetensors", None, None)
    assert (resolved.source, resolved.config.vit) == ("assumed", CONFIGS["dinov2_vitb14"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"format": SCHEMA}, "describes no model.*vit"),
        ({"format": SCHEMA, "schema_version": 2}, "reads up to 1; upgrade it"),
        (
            {"format": SCHEMA, **ModelConfig(vit=TINY).to_dict(), "vit": {"width": 3}},
            "vit.depth is missing",
        ),
        ({"model_type": "dinov2", "hidden_size": 32}, "describes no model.*patch_size"),
        ({"model_type": "dinov2", "hidden_act": "relu"}, "hidden_act is 'relu'"),
        ([1, 2], "neither a config"),
        ("{half", "no JSON"),
    ],
)
def test_a_config_file_that_says_nothing_usable_is_refused(
    values: object, said: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=said):
        resolve_config("folder", _config_file(tmp_path, values), None)


def _copied(tmp_path: Path, config: object, vit: str = "dinov2_vitb14") -> Path:
    """A folder as copied from the Hub: weights as its own wrapper names them, and its config."""
    folder = tmp_path / "XMAG"
    folder.mkdir()
    state = random_state(CONFIGS[vit])
    torch.save({f"backbone.{key}": t for key, t in state.items()}, folder / "pytorch_model.bin")
    _config_file(folder, config)
    (folder / "modeling_xmag.py").write_text("raise SystemExit('remote code was run')")
    return folder


def test_a_copied_folder_of_the_official_repository_is_the_registrys_model(tmp_path: Path) -> None:
    auto_map = {"AutoModel": "modeling_xmag.XMAGModel"}
    config = {"model_type": "xmag", "architectures": ["XMAGModel"], "auto_map": auto_map}
    encoder = load_model(_copied(tmp_path, config), device="cpu")
    known = KNOWN[DEFAULT_MODEL]
    assert encoder.provenance["config"] == known.config.to_dict()
    assert encoder.provenance["config_source"] == "registry"
    assert encoder.provenance["terms"] == known.terms
    assert encoder.tile_spec.mpp == 2.0


@pytest.mark.parametrize("config", [{"model_type": "something_new"}, {}])
def test_a_folder_whose_config_names_nothing_known_loads_where_its_weights_fit(
    tmp_path: Path, config: object
) -> None:
    folder = _copied(tmp_path, config)
    provenance = load_model(folder, device="cpu").provenance
    assert provenance["config_source"] == "assumed"
    assert provenance["config"] == ModelConfig(vit=CONFIGS["dinov2_vitb14"]).to_dict()


def test_a_folder_whose_config_names_nothing_known_and_whose_weights_do_not_fit_asks_for_config(
    tmp_path: Path,
) -> None:
    folder = _copied(tmp_path, {"model_type": "something_new"}, vit="dinov2_vits14")
    with pytest.raises(WeightsError, match=r"does not fit .*Give config="):
        load_model(folder, device="cpu")
    assert load_model(folder, config="dinov2_vits14", device="cpu").embed_dim == 384


def test_torch_is_one_that_reads_the_official_weights() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    assert "torch>=2.10" in project["project"]["dependencies"]


def test_an_unknown_config_name_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"vit_huge.*dinov2_vitb14.*uni2_h"):
        given_config("vit_huge")
