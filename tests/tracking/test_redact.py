"""Secrets are masked, and what only sounds like one is not."""

import pytest

from tracking.redact import is_secret, redact


@pytest.mark.parametrize(
    "name",
    [
        "token", "hf_token", "HF_TOKEN", "accessToken", "api_key", "apiKey", "WANDB_API_KEY", "apikey", "key",
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "client_secret", "password", "db-password", "passwd", "pwd",
        "credentials", "credential_file", "private_key", "auth_token_file", "authorization", "api_keys",
        "ssh_passphrase",
    ],
)  # fmt: skip
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer", "tokens_per_sample", "num_tokens", "token_count", "loss_chunk_tokens", "eos_token", "pad_token",
        "key_dim", "num_kv_heads", "monkey", "keys", "author", "secretary", "compass", "", "vocab_size", "_target_",
    ],
)  # fmt: skip
def test_names_that_only_sound_like_secrets_are_left(name: str) -> None:
    assert not is_secret(name)


def test_a_config_keeps_its_shape_and_loses_its_secrets() -> None:
    config = {
        "data": {"tokenizer": "bpe", "files": None, "hf_token": "abc", "sizes": [1, 2.5, True]},
        "store": {"credentials": {"user": "me", "code": "1234"}, "password": 1234, "token": None},
        "urls": ["https://me:p@ss@host/x?token=abc&page=2", "git@example.com:x.git", "s3://bucket/key"],
        "overrides": ["data.hf_token=abc", "model.num_heads=4"],
    }
    assert redact(config) == {
        "data": {"tokenizer": "bpe", "files": None, "hf_token": "***", "sizes": [1, 2.5, True]},
        "store": {"credentials": "***", "password": "***", "token": None},
        "urls": ["https://***@host/x?token=***&page=2", "git@example.com:x.git", "s3://bucket/key"],
        "overrides": ["data.hf_token=***", "model.num_heads=4"],
    }


def test_a_package_pinned_to_a_revision_is_no_credential() -> None:
    assert redact("git+https://example.com/x.git@v1") == "git+https://example.com/x.git@v1"
