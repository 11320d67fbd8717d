from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

import registration_engine.presets
from dicomnode import config, document, rules
from dicomnode.config import PRESETS, RESERVED, Config
from dicomnode.document import MAX_NODES, ConfigProblemsError, parse
from dicomnode.errors import ConfigError, StudyError
from dicomnode.remotes import Availability, Destination, TlsFiles

ROOT = Path(__file__).resolve().parents[2]

OF_THE_ISSUE = """
node:         {ae_title: DICOMNODE, host: 0.0.0.0, port: 11112, data_dir: ./dicomnode-data, quiet_period_s: 30}
database:     {url: "sqlite:///{data_dir}/node.db"}
destinations: [{name: pacs, ae_title: ORTHANC, host: 127.0.0.1, port: 4242}]
worker:       {device: auto, preset: balanced}
rules:        rules.yaml
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "node.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str) -> list[ConfigError]:
    with pytest.raises(ConfigProblemsError) as caught:
        config.load(written(folder, text))
    return list(caught.value.problems)


def test_every_key_of_the_main_form_is_read_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path, OF_THE_ISSUE))

    assert loaded.node.ae_title == "DICOMNODE"
    assert (loaded.node.port, loaded.node.quiet_period_s) == (11112, 30.0)
    assert loaded.data_dir == tmp_path / "dicomnode-data"
    assert loaded.database_url == f"sqlite:///{tmp_path}/dicomnode-data/node.db"
    assert loaded.destinations == (Destination("pacs", "ORTHANC", "127.0.0.1", 4242),)
    assert (loaded.worker.device, loaded.worker.preset) == ("auto", "balanced")
    assert loaded.rules_path == tmp_path / "rules.yaml"


def test_without_a_file_everything_is_kept_under_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    loaded = config.load(None)

    assert loaded.data_dir == Path(os.getcwd()) / "dicomnode-data"
    assert loaded.database_url == f"sqlite:///{os.getcwd()}/dicomnode-data/node.db"
    assert loaded.destinations == ()
    assert loaded.rules_path is None
    assert list(tmp_path.iterdir()) == []  # loading makes nothing


def test_an_empty_file_means_every_default(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path, "# nothing yet\n"))

    assert loaded.node.port == 11112
    assert loaded.limits.max_associations == 20
    assert loaded.limits.max_pdu == 131072


def test_a_relative_path_to_the_file_still_gives_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, OF_THE_ISSUE)
    monkeypatch.chdir(tmp_path)

    loaded = config.load(Path("node.yaml"))

    assert loaded.data_dir.is_absolute()
    assert loaded.rules_path is not None
    assert loaded.rules_path.is_absolute()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///{data_dir}/node.db", "sqlite:///{folder}/dicomnode-data/node.db"),
        ("sqlite:///index/node.db", "sqlite:///{folder}/index/node.db"),
        ("sqlite:////var/lib/node.db", "sqlite:////var/lib/node.db"),
        ("postgresql+psycopg://node:secret@db/node", "postgresql+psycopg://node:secret@db/node"),
    ],
)
def test_database_urls_are_completed(tmp_path: Path, url: str, expected: str) -> None:
    loaded = config.load(written(tmp_path, f'database: {{url: "{url}"}}'))

    assert loaded.database_url == expected.format(folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "key", "got", "expected"),
    [
        ("node: {prot: 104}", "node.prot", "prot", "did you mean 'port'?"),
        ("nodes: {port: 104}", "nodes", "nodes", "did you mean 'node'?"),
        ("node: {port: 0}", "node.port", 0, "greater than or equal to 1"),
        ("node: {port: 65536}", "node.port", 65536, "less than or equal to 65535"),
        ("node: {port: true}", "node.port", True, "integer"),
        ("node: {port: '104'}", "node.port", "104", "integer"),
        ("node: {quiet_period_s: 0}", "node.quiet_period_s", 0, "greater than 0"),
        ("node: {quiet_period_s: .inf}", "node.quiet_period_s", float("inf"), "finite"),
        ("node: {ae_title: ''}", "node.ae_title", "", "1 to 16"),
        ("node: {ae_title: SEVENTEEN_LETTERS}", "node.ae_title", "SEVENTEEN_LETTERS", "1 to 16"),
        ("node: {ae_title: 'A\\B'}", "node.ae_title", "A\\B", "no backslash"),
        ("node: {ae_title: ' A'}", "node.ae_title", " A", "no space at either end"),
        ("node: {ae_title: KÖLN}", "node.ae_title", "KÖLN", "ASCII"),
        ('node: {ae_title: "A\\tB"}', "node.ae_title", "A\tB", "ASCII"),
        ("node: {ae_title: 12}", "node.ae_title", 12, "quotes"),
        ("node: 7", "node", 7, "mapping"),
        ("node: {host: 'a b'}", "node.host", "a b", "host name"),
        ("destinations: [{name: a, ae_title: A, host: h}]", "destinations[0].port", "nothing", "required"),
        (
            "destinations: [{name: a, ae_title: A, host: h, port: 1}, {name: b, ae_title: B, host: h, port: 0}]",
            "destinations[1].port",
            0,
            "greater",
        ),
        (
            "destinations: [{name: a, ae_title: A, host: h, port: 1}, {name: a, ae_title: B, host: h, port: 2}]",
            "destinations[1].name",
            "a",
            "no other destination has",
        ),
        ("destinations: {name: a}", "destinations", "a mapping", "a list"),
        ("worker: {device: gpu}", "worker.device", "gpu", "cuda:N"),
        ("worker: {device: 'cuda:x'}", "worker.device", "cuda:x", "cuda:N"),
        ("worker: {preset: balance}", "worker.preset", "balance", "did you mean 'balanced'?"),
        ("database: {url: 'mysql://u:secret@h/d'}", "database.url", "mysql://u:***@h/d", "postgresql+psycopg://"),
        ("database: {url: 'sqlite://'}", "database.url", "sqlite://", "sqlite:///FILE"),
        ("database: {url: 'sqlite:///:memory:'}", "database.url", "sqlite:///:memory:", "sqlite:///FILE"),
        ("access: {mode: all}", "access.mode", "all", "'any' or 'known'"),
        ("{access: {mode: known}, peers: []}", "peers", "no peers", "at least one peer"),
        ("peers: [{ae_title: A, host: h, adress: x}]", "peers[0].adress", "adress", "one of ae_title, host"),
        ("limits: {max_associations: 0}", "limits.max_associations", 0, "greater"),
        ("log: {level: loud}", "log.level", "loud", "'debug'"),
        ("tls: {certificate: a.pem, key: k.pem}", "tls.client_ca", "nothing", "required"),
        (
            "tls: {certificate: a.pem, key: k.pem, client_ca: c.pem, port: 11112}",
            "tls.port",
            11112,
            "another port than node.port",
        ),
        ("limits: {reject_below_free_mb: 4096}", "limits.reject_below_free_mb", 4096, "at most refuse_below_free_mb"),
        ("peers: [{ae_title: A, host: 10.0.0.0/xx}]", "peers[0].host", "10.0.0.0/xx", "a network"),
        ("web: yes please", "web", "yes please", "a mapping"),
        ("{web: {host: 127.0.0.1, port: 11112}}", "web.port", 11112, "another port than node.port"),
        ('node: {data_dir: ""}', "node.data_dir", "", "a path"),
        ('node: {data_dir: "a\\0b"}', "node.data_dir", "a\0b", "a path"),
        ("node: {data_dir: ~nobody-of-this-name/x}", "node.data_dir", "~nobody-of-this-name/x", "a user of this"),
        ('database: {url: "sqlite:///a\\0b"}', "database.url", "sqlite:///a\0b", "sqlite:///FILE"),
        ("database: {url: 'postgresql+psycopg://u@h:x/d'}", "database.url", "postgresql+psycopg://u@h:x/d", ":PORT/"),
    ],
)
def test_a_mistake_is_named_by_key_got_and_expected(
    tmp_path: Path, text: str, key: str, got: object, expected: str
) -> None:
    (problem,) = problems(tmp_path, text)

    assert problem.file == f"{tmp_path / 'node.yaml'}:1"
    assert (problem.key, problem.got) == (key, got)
    assert expected in problem.expected


def test_what_is_no_file_of_reasonable_size_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("#" * (document.MAX_BYTES + 1))
    (tmp_path / "binary").write_bytes(b"node: \xff")
    for name, reason in (
        ("fifo", "a folder or device"),
        (".", "a folder or device"),
        ("large", "4194304 bytes at most"),
        ("binary", "byte 0xff at 6"),
        ("absent", "No such file"),
    ):
        for load in (config.load, rules.load):
            with pytest.raises(ConfigError, match=reason):
                load(tmp_path / name)


def test_every_mistake_of_a_file_is_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = "node:\n  port: 0\n  ae_tite: X\nworker:\n  preset: best\ndestinations:\n  - name: a\n    port: 99999\n"

    found = problems(tmp_path, text)

    lines = {problem.key: problem.file.rsplit(":", 1)[1] for problem in found}
    assert lines == {
        "node.port": "2",
        "node.ae_tite": "3",
        "worker.preset": "5",
        "destinations[0].ae_title": "7",
        "destinations[0].host": "7",
        "destinations[0].port": "8",
    }


def test_the_error_of_several_mistakes_is_one_config_error_with_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(written(tmp_path, "node: {port: 0, prot: 1}"))

    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(str(tmp_path)) for line in lines)


def test_a_password_is_neither_shown_in_an_error_nor_in_the_configuration_s_text(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "database: {url: 'postgres://node:hunter2@db/node'}")
    good = config.load(written(tmp_path, "database: {url: 'postgresql+psycopg://node:hunter2@db/node'}"))

    assert "hunter2" not in str(problem)
    assert "hunter2" not in repr(good)


@pytest.mark.parametrize("name", RESERVED)
def test_a_section_of_a_later_version_is_accepted_and_warned_about(tmp_path: Path, name: str) -> None:
    loaded = config.load(written(tmp_path, f"{name}: {{anything: 1}}"))

    assert f"section {name} is reserved for a later version and has no effect yet" in loaded.warnings()


def test_a_bare_configuration_warns_of_open_access_no_destination_and_no_rules() -> None:
    found = Config().warnings()

    assert [line.split(":")[0] for line in found] == [
        "access.mode is any",
        "no destinations are configured",
        "no rules are configured",
    ]


def test_a_complete_configuration_has_nothing_to_warn_of(tmp_path: Path) -> None:
    text = OF_THE_ISSUE + "access: {mode: known}\npeers: [{ae_title: CT1}]\n"

    assert config.load(written(tmp_path, text)).warnings() == []


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("node: {port: 1\nlog: {}", "2", "valid YAML"),
        ("node: {port: 1}\nnode: {port: 2}", "2", "each key once"),
        ("node:\n  port: 1\n  port: 2", "3", "each key once"),
        ("node: {1: 2}", "1", "a word as key"),
        ("on: {a: 2}", "1", "a word as key"),
        ("node: !!python/object/apply:os.system ['true']", "1", "valid YAML"),
        ("node: &a\n  x: *a", "1", "valid YAML"),
        ("a: 1\n--- \nb: 2", "2", "valid YAML"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(tmp_path: Path, text: str, line: str, expected: str) -> None:
    (problem,) = problems(tmp_path, text)

    assert problem.file.rsplit(":", 1)[1] == line
    assert expected in problem.expected


@pytest.mark.parametrize(
    "text",
    ["- a\n- b", "just text", "node: \x07", "node: 2024-99-99", "[" * 3000, "node: " + "{a: " * 3000],
    ids=["list", "scalar", "control character", "no date", "open brackets", "open braces"],
)
def test_other_texts_are_refused_and_never_a_traceback(tmp_path: Path, text: str) -> None:
    assert len(problems(tmp_path, text)) == 1


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]

    with pytest.raises(ConfigProblemsError, match=f"more than {MAX_NODES} values"):
        parse("\n".join(lines), "bomb.yaml")


def test_anchors_and_merges_that_save_writing_are_welcome(tmp_path: Path) -> None:
    text = (
        "destinations:\n"
        "  - &first {name: a, ae_title: A, host: h, port: 104}\n"
        "  - {<<: *first, name: b}\n"
    )  # fmt: skip

    loaded = config.load(written(tmp_path, text))

    assert loaded.destinations == (Destination("a", "A", "h", 104), Destination("b", "A", "h", 104))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["absent", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "node.yaml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert caught.value.file == str(path)


def test_a_configuration_cannot_be_changed_after_loading() -> None:
    loaded = Config()

    with pytest.raises(ValidationError):
        loaded.node.port = 104  # type: ignore[misc]


def test_presets_are_those_of_the_engine() -> None:
    assert set(PRESETS) == set(registration_engine.presets.PRESETS)


def test_the_schema_names_every_section_and_describes_every_key() -> None:
    schema = json.loads(json.dumps(config.schema()))

    assert set(schema["properties"]) == {
        *("node", "database", "destinations", "worker", "rules", "access", "peers", "sources", "tls", "limits", "web"),
        "log",
        *RESERVED,
    }
    assert schema["additionalProperties"] is False
    undescribed = [
        f"{section}.{key}"
        for section, body in schema["$defs"].items()
        for key, about in body["properties"].items()
        if "description" not in about and "$ref" not in about  # a section's own description stands with it
    ]
    assert undescribed == []
    assert schema["$defs"]["NodeSection"]["properties"]["port"]["maximum"] == 65535


def test_the_example_configuration_loads_and_shows_every_default() -> None:
    loaded = config.load(ROOT / "deploy" / "node.yaml")
    plain = config.load(None)

    assert loaded.rules_path == ROOT / "deploy" / "rules.yaml"
    for section in ("worker", "access", "limits", "log"):
        assert getattr(loaded, section) == getattr(plain, section)
        assert loaded.model_fields_set >= {section}
    assert loaded.node.model_dump(exclude={"data_dir"}) == plain.node.model_dump(exclude={"data_dir"})
    assert loaded.limits.model_fields_set == set(type(loaded.limits).model_fields)
    assert loaded.node.model_fields_set == set(type(loaded.node).model_fields)


DESTINATIONS = """
peers:
  - {ae_title: CT1, host: 10.0.0.7, port: 104}
  - {ae_title: CT2, host: 10.0.0.0/24, port: 104}
  - {ae_title: CT3, host: 10.0.0.8}
destinations:
  - {name: pacs, ae_title: PACS, host: pacs.example, port: 104}
  - {name: cloud, url: "https://dicom.example/dicom-web"}
  - name: slow
    ae_title: SLOW
    host: slow.example
    port: 104
    associations: 1
    timeout_s: 10.0
    retry: {first_s: 1.0, factor: 3.0, longest_s: 60.0, give_up_after_h: 48.0}
    hours: {from: "22:00", to: "06:00"}
    paused: true
    skip_present: true
    commitment_within_h: 6.0
    announce_to: {ae_title: RIS, host: ris.example, port: 105}
    tls: {certificate: node.pem, key: node.key, ca: /etc/ca.pem, check_host_name: false}
"""


def test_a_destination_says_how_it_is_sent_to(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(DESTINATIONS)

    pacs, cloud, slow = config.load(file).destinations

    assert pacs == Destination("pacs", "PACS", "pacs.example", 104)
    assert (cloud.url, cloud.host, cloud.port) == ("https://dicom.example/dicom-web", "dicom.example", 443)
    assert slow.hours is not None
    assert slow.hours(datetime(2026, 1, 2, 12)) == datetime(2026, 1, 2, 22)
    assert replace(slow, hours=None) == Destination(
        "slow", "SLOW", "slow.example", 104, associations=1, timeout_s=10, first_pause_s=1, pause_factor=3,
        longest_pause_s=60, give_up_after_s=48 * 3600, is_paused=True, skip_present=True, commitment_within_s=6 * 3600,
        announce_to=Availability("RIS", "ris.example", 105),
        tls=TlsFiles(tmp_path / "node.pem", tmp_path / "node.key", Path("/etc/ca.pem"), check_host_name=False),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("name: sender, ae_title: A, host: h, port: 104", "destinations[0].name"),
        ("name: a, url: ftp://h/x", "destinations[0].url"),
        ("name: a, url: https://h/x, skip_present: true", "destinations[0].skip_present"),
        ("name: a, url: https://h/x, commitment_within_h: 1.0", "destinations[0].commitment_within_h"),
        ("name: a, ae_title: A, host: h, port: 1, retry: {first_s: 9.0, longest_s: 1.0}",
         "destinations[0].retry.longest_s"),
        ("name: a, ae_title: A, host: h, port: 1, tls: {certificate: a, key: b}", "destinations[0].tls.ca"),
    ],
)  # fmt: skip
def test_a_destination_that_makes_no_sense_is_refused_by_its_key(tmp_path: Path, more: str, key: str) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(f"destinations: [{{{more}}}]")

    with pytest.raises(ConfigError) as caught:
        config.load(file)

    assert caught.value.key == key


def test_what_goes_back_to_the_sender_finds_its_destination_or_says_whose_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(DESTINATIONS)
    loaded = config.load(file)

    assert loaded.route(None, ["CT1"]) == ["pacs", "cloud", "slow"]
    assert loaded.route(["sender", "pacs"], ["CT1", "PACS"]) == ["sender:CT1", "pacs"]
    assert loaded.peer_destinations == (Destination("sender:CT1", "CT1", "10.0.0.7", 104),)
    with pytest.raises(StudyError, match="CT2, CT3"):
        loaded.route(["sender"], ["CT1", "CT2", "CT3"])
    with pytest.raises(StudyError, match="destination gone of the rule is not configured"):
        loaded.route(["gone"], [])
