"""Secrets are found and hidden, ordinary text is left alone, and no config may hold one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from test_config import MINIMAL

from dspref import config, distributed, launcher, secrets
from dspref.errors import ConfigError, EnvironmentFault
from dspref.run import folder as run_folder

# Made up. (text, the part that must go)
SECRETS = [
    ("token hf_abcdefghijABCDEFGHIJklmnop1234 refused", "hf_abcdefghijABCDEFGHIJklmnop1234"),
    ("https://hf_abcdefghijABCDEFGHIJklmnop1234@huggingface.co/x", "hf_abcdefghijABCDEFGHIJklmnop1234"),
    ("ghp_0123456789abcdefghijABCDEFGHIJ012345", "ghp_0123456789abcdefghijABCDEFGHIJ012345"),
    ("github_pat_11ABCDEFG0123456789_abcdef", "github_pat_11ABCDEFG0123456789_abcdef"),
    ("Bearer sk-proj-abc123DEF456ghi789jkl", "sk-proj-abc123DEF456ghi789jkl"),
    ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567", "0123456789abcdef0123456789abcdef01234567"),
    ('{"key": "0123456789abcdef0123456789abcdef01234567"}', "0123456789abcdef0123456789abcdef01234567"),
    ("git clone https://me:hunter2@example.org/x.git", "hunter2"),
    ("postgres://:hunter2@db/x", "hunter2"),
    ("password: correct-horse", "correct-horse"),
    ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG+bPxRfiCY", "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN", "dozjgNryP4J3jVmN"),
]
ORDINARY = [
    "model.revision: 0123456789abcdef0123456789abcdef01234567",
    '"model": "' + "0123456789abcdef" * 4 + '"',
    "runs/risk-adjusted-preference-dataset-2026",
    "git@github.com:me/repo.git and ssh://git@github.com/me/repo",
    "https://huggingface.co:443/datasets/a/b@main",
    "hf_hub_download, sk-learn, token id 50257 does not fit, pad_token: <|endoftext|>",
    "Password: {password_column}",
    "2026-11-21T22:10:00+00:00 step 3/10  loss 0.6931",
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_known_shapes_are_hidden(text, secret):
    assert secrets.kind_of(text, {})
    shown = secrets.redact(text, {})
    assert secret not in shown and secrets.HIDDEN in shown
    assert secrets.redact(shown, {}) == shown


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_left_alone(text):
    assert secrets.redact(text, {}) == text and secrets.kind_of(text, {}) is None


def words(text):
    return text.split()


TELLING = words("""
    PGPASSWORD HFTOKEN MYSQL_PWD GITHUB_PAT SSHPASS MY_CREDS REDISCLI_AUTH AZURE_CONNECTION AZURE_CONNECTION_STRING
    HF_TOKEN GH_TOKEN WANDB_API_KEY OPENAI_API_KEY AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN GOOGLE_APPLICATION_CREDENTIALS
    DB_PASSWORD DB_PASS DBPASS SMTPPASS PASSWORD PASSWD MYPASSWD GPG_PASSPHRASE SECRET CLIENT_SECRET CLIENTSECRET APP_SECRETS
    OPENAIKEY APIKEY apikey myApiKey PRIVATE_KEY SSHKEY API_KEYS TOKEN TOKEN_2 KEY1 hf_token DB_PWD DBPWD
    AZURE_DEVOPS_EXT_PAT
    GITHUBPAT PAT BASIC_AUTH NPM_AUTH PROXYAUTH HTTP_AUTHORIZATION AZURE_STORAGE_CONNECTION_STRING SQL_CONN_STR SQLCONNSTR_X
    AZURE_STORAGE_SAS SENTRY_DSN VNC_PW SESSION_COOKIE MYCREDS CRED WIFI_PSK API_TOKENS DOCKER_AUTH_CONFIG SERVICE_JWT
    ROOTPW LDAP_BINDPW BINDPW_2 MYPAT MY_PAT_1 SAS_URL CONTAINER_SAS_URL CI_JOB_JWT_V2 CI_JOB_JWT MYJWT API_TKN APITKN
    SLACK_WEBHOOK SLACK_WEBHOOK_URL MSTEAMS_WEBHOOK_URI DISCORDWEBHOOK webhook_url
    LDAP_BIND_PASSWORD AWS_ACCESS_KEY_ID RESTIC_PASSWORD2 VAULT_PASSCODE SLURM_JWT CI_JOB_TOKEN
""")
NOT_TELLING = words("""
    PATH PYTHONPATH LD_LIBRARY_PATH XAUTHORITY MONKEY KEYBOARD COMPATIBILITY COMPAT EXPAT AUTHOR GIT_AUTHOR_NAME PWD OLDPWD
    OLD_PWD ORIGINAL_PWD SSH_AUTH_SOCK SSH_CONNECTION SSH_ASKPASS GIT_ASKPASS TOKENIZERS_PARALLELISM MAX_TOKENS
    TOKENS_PER_PACK
    HF_TOKEN_PATH PASSWORD_FILE BYPASS COMPASS PATIENCE PATTERN SPATIAL KEYS_DIR SACRED DISPLAY HOME USER LANG SHELL TERM
    OMP_NUM_THREADS MASTER_ADDR MASTER_PORT WORLD_SIZE NCCL_SOCKET_IFNAME CUDA_VISIBLE_DEVICES HF_HOME HF_HUB_OFFLINE
    TRANSFORMERS_CACHE SLURM_JOB_ID SLURM_SUBMIT_DIR TMPDIR XDG_RUNTIME_DIR DBUS_SESSION_BUS_ADDRESS PAD_TOKEN KEYMAP HOTKEY
    DONKEY SECRETARY PASSENGER PASSES PATCH AUTHENTICITY MAX_CONNECTIONS CONNECTION_TIMEOUT CREDIT DETOKENIZE AUTH_TYPE
    WEBHOOK_PORT JWT_ALGORITHM DATABASE_URL HF_ENDPOINT_URL PWD SPAT COMPATPATH PATS_HOME MPW_SIZE KANSAS
    TOKENIZER PASSTHROUGH KEYWORD MONKEYS TURKEY HISTFILE PSKOV SASH
""")


@pytest.mark.parametrize("name", TELLING)
def test_names_of_variables_that_hold_a_secret(name):
    assert secrets.is_telling(name)
    assert secrets.redact("is open-sesame-42 here", {name: "open-sesame-42"}) == "is *** here"


@pytest.mark.parametrize("name", NOT_TELLING)
def test_names_of_variables_that_hold_none(name):
    assert not secrets.is_telling(name)


def test_values_of_telling_variables_are_hidden():
    env = {
        **{"DB_PASSWORD": 'pa"ss\\wo rd', "MY_API_KEY": "abcdefgh", "LONGER_TOKEN": "abcdefgh-and-more"},
        **{"TOKENIZERS_PARALLELISM": "disabled", "HF_TOKEN_PATH": "/home/me/token"},
        **{"PIN_TOKEN": "1234567", "KEYBOARD": "qwertyuiop"},
    }  # fmt: skip
    text = 'pa"ss\\wo rd, abcdefgh-and-more, abcdefgh, disabled /home/me/token 1234567 qwertyuiop'
    assert secrets.redact(text, env) == "***, ***, ***, disabled /home/me/token 1234567 qwertyuiop"
    assert "ss" not in secrets.redact(json.dumps({"said": env["DB_PASSWORD"]}), env)
    assert json.loads(secrets.redact(json.dumps({"said": env["DB_PASSWORD"]}), env)) == {"said": "***"}
    assert secrets.redact("pa%22ss%5Cwo%20rd", env) == "***"
    assert secrets.kind_of("runs/abcdefgh", env) == "the value of $MY_API_KEY"
    words = ["train.py", "--api-key", "pw-of-no-known-shape", "log.every=1", "--wandb-key", "0123456789" * 4]
    assert secrets.redact_words(words) == ["train.py", "--api-key", "***", "log.every=1", "--wandb-key", "***"]


def test_long_text_takes_no_longer_than_its_length():
    """A pattern that looks at each start again would take hours."""
    for piece in ("a", "a.", "sk-", "key", "http://", "-----BEGIN ", "eyJ"):
        text = piece * (200_000 // len(piece))
        assert secrets.redact(text, {}) == text


def test_json_stays_json():
    texts = ["-----BEGIN PRIVATE KEY-----\nMII", "password: hunter2hunter2", "https://a:b@c", *(text for text, _ in SECRETS)]
    assert len(json.loads(secrets.redact(json.dumps({"state": "running", "errors": texts}), {}))["errors"]) == len(texts)


HUB = "hf_abcdefghijABCDEFGHIJklmnop1234"


@pytest.mark.parametrize(
    ("text", "overrides", "place"),
    [
        (MINIMAL + f"log: {{project: {HUB}}}\n", [], "run.yaml:5:7: log.project: holds a Hugging Face token"),
        (MINIMAL, [f"log.run_name={HUB}"], "override 'log.run_name=***': log.run_name: holds a Hugging Face token"),
        (MINIMAL, [f"log.run_name=[{HUB}"], "override 'log.run_name=[***': not valid YAML"),
        (MINIMAL, [f"hf_token={HUB}"], "override 'hf_token=***': hf_token: unknown key"),
        (MINIMAL, [f"train.seed={HUB}"], "train.seed"),
        (MINIMAL, ["data.train.path=https://me:hunter2abc@host/x.jsonl"], "holds a password in a URL"),
        (MINIMAL, ["output_dir=runs/open sesame"], "output_dir: holds the value of $VAULT_PASSWORD"),
        (MINIMAL.replace("path: p.jsonl", f"path: {HUB}"), [], "data.train.path: holds"),
        (MINIMAL + f"  # {HUB}\nobjective: {HUB}\n", [], "run.yaml:6:1: objective"),
        (MINIMAL.replace("data:", f"data:\n  eval: {{a: {{path: x}}, {HUB}: {{path: y}}}}"), [], "data.eval.***: holds"),
        (MINIMAL + "deepspeed: STRATEGY\n", [], "run.yaml:5:1: deepspeed"),
    ],
)
def test_a_config_may_hold_no_secret(text, overrides, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VAULT_PASSWORD", "open sesame")
    strategy = {"zero_optimization": {"stage": 3}, "flops_profiler": {"enabled": True, "output_file": f"/x/{HUB}"}}
    (tmp_path / "strategy.json").write_text(json.dumps(strategy))
    (tmp_path / "run.yaml").write_text(text.replace("STRATEGY", str(tmp_path / "strategy.json")))
    assert launcher.main(["--config", str(tmp_path / "run.yaml"), *overrides]) == 2
    said = capsys.readouterr().err
    assert place in said and said.count("\n") == 1
    assert not any(secret in said for secret in (HUB, "hunter2abc", "open sesame"))


def test_a_config_in_a_folder_that_is_a_secret(tmp_path):
    (tmp_path / HUB).mkdir()
    (tmp_path / HUB / "run.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"^--config: .*/\*\*\*/run.yaml: holds a Hugging Face token") as caught:
        config.load(tmp_path / HUB / "run.yaml")
    assert HUB not in str(caught.value)


def test_errors_logs_and_run_folders_hide_them(tmp_path, monkeypatch, capsys):
    assert HUB not in str(EnvironmentFault(f"https://{HUB}@hub: 401"))
    monkeypatch.setattr(distributed, "_log_file", None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    distributed.log_to(tmp_path)
    distributed.log(f"with {HUB}")
    with_library = distributed.LogFile(tmp_path / "rank-1.log")
    print("GET", f"https://me:hunter2abc@host/{HUB}", "\ud800", file=with_library)
    (tmp_path / "run.yaml").write_text(MINIMAL + f"# my token: {HUB}\n")
    monkeypatch.chdir(tmp_path)
    run = run_folder.RunFolder("out")
    run.path.mkdir()  # as the lock does
    run.open(config.resolved(config.load("run.yaml")), Path("run.yaml"), {}, steps=1)
    run.update(error=f"401 for {HUB}")
    run.event("failed", error=f"401 for {HUB}")

    def bug():
        raise ValueError(HUB)

    assert launcher.guarded(bug) == 1
    said = capsys.readouterr()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.yaml"]
    assert len(written) >= 8
    for text in (said.out, said.err, *(path.read_text() for path in written)):
        assert HUB not in text and "hunter2abc" not in text
    assert "with ***" in said.out and "ValueError: ***" in said.err
    assert "with ***" in (tmp_path / "rank-0.log").read_text()
    assert "https://***@host/***" in (tmp_path / "rank-1.log").read_text()
    assert "# my token: ***" in (tmp_path / "out" / "config.source.yaml").read_text()


# Text that a shell or an unpickler would run.
DANGEROUS = re.compile(
    r"shell=True|os\.system|os\.popen|(?<![.\w])(?:eval|exec)\(|pickle\.loads?\(|yaml\.load\((?!text, Loader=_Loader\))"
    r"|torch\.load\((?![^\n]*weights_only=True)"
)


@pytest.mark.parametrize("folder", ["dspref", "launch", "benchmarks"])
def test_nothing_goes_through_a_shell_or_a_pickle(folder):
    files = sorted(Path(folder).rglob("*.py"))
    assert files
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not DANGEROUS.search(line), f"{path}:{number}: {line.strip()}"


def test_what_is_dangerous_would_be_found():
    for line in (
        "run(x, shell=True)",
        "os.system('x')",
        "yaml.load(x)",
        "torch.load(x)",
        "pickle.load(f)",
        "pickle.loads(b)",
    ):
        assert DANGEROUS.search(line), line
    assert not DANGEROUS.search("torch.load(x, weights_only=True)")
