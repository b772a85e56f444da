"""An upload that fails says why and what to do, leaves the local adapter as it was, and can be repeated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.hub.client import Failed
from tests.hub.conftest import BASE, content_of

pytestmark = pytest.mark.hub


def failed_push(client, folder: Path, name: str, **arguments) -> Failed:
    """Push, check that it fails with an error that names both places, and that nothing changed in the folder."""
    before = content_of(folder)
    with pytest.raises(Failed) as caught:
        client.call("push_folder", folder=str(folder), name=name, **arguments)
    assert content_of(folder) == before
    assert f"The upload to {name} did not finish: " in caught.value.message
    assert f"lies complete and unchanged in {folder}" in caught.value.message
    return caught.value


def succeeds(hub, client, folder: Path, name: str) -> None:
    client.call("push_folder", folder=str(folder), name=name, token=hub.token)
    assert len(hub.messages(name)) == 1
    assert hub.files(name)["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def test_a_missing_token(hub, client, folder):
    error = failed_push(client, folder, "user/missing")
    assert error.kind == "PermissionError" and "there is no token" in error.message
    assert "hf auth login" in error.message and "HF_TOKEN" in error.message
    assert "user/missing" not in hub.repositories
    succeeds(hub, client, folder, "user/missing")


def test_a_token_the_hub_does_not_know(hub, client, folder):
    error = failed_push(client, folder, "user/wrong", token="hf_of_yesterday")
    assert error.kind == "PermissionError" and "does not know the token" in error.message
    assert "settings/tokens" in error.message and "hf_of_yesterday" not in error.message
    succeeds(hub, client, folder, "user/wrong")


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_without_write_access(hub, client, folder, exists):
    name = f"user/refused-{exists}"
    if exists:
        client.call("push_folder", folder=str(folder), name=name, token=hub.token, metrics={"x": 1})
    hub.read_only = True
    error = failed_push(client, folder, name, token=hub.token)
    assert error.kind == "PermissionError" and "may not write there" in error.message
    assert "don't have write access" in error.message
    hub.read_only = False
    client.call("push_folder", folder=str(folder), name=name, token=hub.token)
    assert len(hub.messages(name)) == 1 + exists


def test_a_name_of_somebody_else(hub, client, folder):
    error = failed_push(client, folder, "other/name", token=hub.token)
    assert error.kind == "PermissionError" and "under other" in error.message


@pytest.mark.parametrize("upload_mode", ["lfs", "regular"])
def test_a_connection_that_breaks_in_the_commit(hub, client, folder, upload_mode):
    name = f"user/broken-{upload_mode}"
    hub.upload_mode = upload_mode
    hub.cuts["commit"] = 1
    error = failed_push(client, folder, name, token=hub.token)
    assert error.kind == "ConnectionError" and "the connection broke" in error.message
    assert hub.messages(name) == []
    succeeds(hub, client, folder, name)


def test_a_connection_that_breaks_once_within_the_weights_is_taken_up_again(hub, client, folder):
    hub.cuts["put"] = 1
    succeeds(hub, client, folder, "user/resumed")
    assert hub.cuts["put"] == 0


@pytest.mark.slow
def test_a_connection_that_keeps_breaking_within_the_weights(hub, client, folder):
    hub.cuts["put"] = 100
    error = failed_push(client, folder, "user/dead", token=hub.token)
    assert error.kind == "ConnectionError" and not hub.lfs
    hub.cuts.clear()
    succeeds(hub, client, folder, "user/dead")


def test_a_model_whose_upload_fails_is_kept_in_a_folder_that_can_be_pushed(hub, client, tmp_path):
    hub.cuts["commit"] = 1
    with pytest.raises(Failed) as caught:
        client.call("push_model", base=BASE, name="user/kept", logits=str(tmp_path / "logits.pt"), token=hub.token)
    folder, name = re.search(r"push_adapter\('(.*?)', '(.*?)', \.\.\.\) again", caught.value.message).groups()
    succeeds(hub, client, Path(folder), name)


def test_what_the_hub_says_of_a_card_it_refuses_is_passed_on(hub, client, folder):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: my own\n", 1))
    error = failed_push(client, folder, "user/license", token=hub.token)
    assert error.kind == "OSError" and "'my own' is not a license" in error.message
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: mit\n", 1))
    succeeds(hub, client, folder, "user/license")
