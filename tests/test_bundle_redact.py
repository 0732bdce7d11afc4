"""Redaction: a planted secret goes in every form, what is no secret stays, and a second pass changes nothing."""

import base64
import json
import secrets
from pathlib import Path
from urllib.parse import quote

import pytest

from deploy.redact import MARK, PROMPT_MARK, Redactor, is_secret_name, known_secrets, secret_keys
from deploy.redact_rules import encodings

PLANTED = 'Zx9+/q"t\\w&' + "planted%7-secret"  # with all that escaping changes
HF, AWS, JWT = "hf_" + "Ab3" * 10, "AKIA" + "ABCDEFGH12345678", "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + "c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "name",
    ["token", "HF_TOKEN", "api_key", "apiKey", "X-Api-Key", "judge.password", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "clientSecret",
     "Authorization", "Cookie", "X-Amz-Signature", "credentials", "WANDB_API_KEY", "auth", "sig"],
)  # fmt: skip
def test_a_name_that_announces_a_secret_is_seen(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["token_file", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "max_tokens", "tokenizer", "learning_rate", "config_digest", "monkey", "author",
     "keyboard", "prompt_id", "max_sequence_length"],
)  # fmt: skip
def test_a_name_that_points_counts_or_only_resembles_is_none(name: str) -> None:
    assert not is_secret_name(name)


def test_a_known_value_goes_in_every_encoding_and_at_every_place_of_base64() -> None:
    redactor = Redactor([PLANTED])
    texts = [
        PLANTED, json.dumps({"a": PLANTED}), json.dumps(json.dumps({"a": PLANTED})), quote(PLANTED, safe=""), repr([PLANTED]),
        PLANTED.encode().hex(), *(base64.b64encode(f"{'u' * width}:{PLANTED}:tail".encode()).decode() for width in range(6)),
        *(base64.urlsafe_b64encode(f"{'u' * width}{PLANTED}".encode()).decode() for width in range(3)),
    ]  # fmt: skip
    for text in texts:
        cleaned = redactor.text(f"before {text} after")
        assert MARK in cleaned and "before" in cleaned and "after" in cleaned, text
        assert not any(form in cleaned for form in encodings(PLANTED)), text


def test_a_known_value_that_a_terminal_broke_into_lines_goes_too() -> None:
    value = secrets.token_hex(20)
    assert Redactor([value]).text(f"x {value[:13]}\n   {value[13:]} y") == f"x {MARK} y"


@pytest.mark.parametrize(
    "text",
    [
        f"loaded with {HF} at once", f"key id {AWS}.", f"jwt={JWT}", f"https://example.org/a?X-Amz-Signature={HF}&part=1",
        f"s3://user:{HF}@bucket/run", f"https://{HF}@example.org/repo.git", f"Authorization: Basic {base64.b64encode(b'me:hunter2hunter2').decode()}",
        f"curl -H 'Authorization: Bearer {'q7' * 9}'", f"{{\\\"api_key\\\": \\\"{'q7' * 9}\\\", \\\"n\\\": 3}}", f"--judge-token {'q7' * 9} --n 3",
        f"password = '{'q7' * 9} with spaces'", f"Set-Cookie: session={'q7' * 9}; HttpOnly", f"PASSWORD={'q7' * 9}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{'q7' * 9}\nabc\n-----END RSA PRIVATE KEY-----",
        f"url=https%3A%2F%2Fexample.org%2F%3Ftoken%3D{'q7' * 9}", f"payload {base64.b64encode(f'token={HF} end'.encode()).decode()}",
        f"first line\n  token: {'q7' * 9}\nlast line", f"ghp_{'a1B2' * 6} sk-{'a1B2' * 6} github_pat_{'a1B2' * 6}",
    ],
)  # fmt: skip
def test_a_secret_that_nobody_announced_goes_by_its_name_or_shape(text: str) -> None:
    cleaned = Redactor().text(text)
    assert MARK in cleaned
    for gone in (HF, AWS, JWT, "q7" * 9, "a1B2" * 6, base64.b64encode(b"me:hunter2hunter2").decode()):
        assert gone not in cleaned
    assert Redactor().text(cleaned) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "RunStore.commit: group g00000017 has 15 of 16 samples; raise group_timeout_s", "sha256 " + "0f" * 32, "max_tokens=512, seed: 20250505",
        "the bearer token is missing or wrong; basic instructions follow", "learner.learning_rate=1e-3 --set rollout.num_workers=4",
        "gate scorer: geneval_strict scored its known image 0.2500", "token_file = 'secrets/reward-token'", "tokens: 77",
        "deploy/prompts/tiny-geneval/train.jsonl", "http://127.0.0.1:8300/v1/score?page=2&size=10",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays_to_the_letter(text: str) -> None:
    assert Redactor().text(text) == text


def test_in_json_all_below_a_secret_name_goes_and_numbers_stay() -> None:
    given = {"judge": {"api_key": "abcdefgh", "password": 123456, "max_tokens": 5, "tokens": 7}, "credentials": {"user": ["first", "second"]},
             "note": "see token=abcdefgh", "reward": [{"name": "ocr", "seed": 1}]}  # fmt: skip
    assert json.loads(Redactor().document(json.dumps(given))) == {
        "judge": {"api_key": MARK, "password": MARK, "max_tokens": 5, "tokens": 7}, "credentials": {"user": [MARK, MARK]},
        "note": f"see token={MARK}", "reward": [{"name": "ocr", "seed": 1}],
    }  # fmt: skip
    assert Redactor().document('{"token": "abcdefgh", cut') == f'{{"token": "{MARK}", cut'


def test_prompts_and_names_go_where_they_are_known() -> None:
    redactor = Redactor(prompts=["a photo of a red cube"], names=[("/users/jo.doe", "~"), ("jodoe", "USER"), ("gpu-node-17", "HOST")])
    said = redactor.text("gpu-node-17: /users/jo.doe/run of jodoe (jodoes): 'a photo of a red cube' in /home/someone/x")
    assert said == f"HOST: ~/run of USER (jodoes): '{PROMPT_MARK}' in ~/x"


def test_secrets_are_known_from_variables_and_token_files(tmp_path: Path) -> None:
    files = {"auth_token": "0123abcd\n", "netrc": "machine api.example.org\n  login user\n  password netrc-pass-1\n",
             "credentials": "[default]\naws_secret_access_key = aws-secret-1\nregion = eu\n"}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    environ = {"HF_TOKEN": "hf-value-1", "RAY_AUTH_MODE": "token", "PATH": "/usr/bin", "GITHUB_TOKEN": "", "PWD": "/usr", "DB_PWD": "/usr"}
    found = known_secrets(environ, [*(tmp_path / name for name in files), tmp_path / "gone"])
    assert sorted(found) == ["0123abcd", "aws-secret-1", "hf-value-1", "netrc-pass-1"]


def test_a_recipes_secrets_are_named_without_their_values() -> None:
    tables = {"reward": [{"name": "vlm", "options": {"api_key": "abcdefgh", "token_file": "x", "note": HF}}], "run": {"name": "a"}}
    assert secret_keys(tables, Redactor()) == ["reward.0.options.api_key", "reward.0.options.note"]
