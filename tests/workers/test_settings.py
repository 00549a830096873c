import pytest

from bus import ConfigError
from schemas.subjects import InvalidIdentifier
from workers.settings import Settings


def test_variables_are_read_and_arguments_win() -> None:
    environ = {"NIXLBUS_GRAPH": "other", "NIXLBUS_KV_BLOCKS": "7", "NIXLBUS_REQUEST_TIMEOUT_S": "1.5"}
    settings = Settings.from_env(environ, kv_blocks=9, model=None)
    assert (settings.graph, settings.kv_blocks, settings.request_timeout_s) == ("other", 9, 1.5)
    assert settings.model == ""


@pytest.mark.parametrize("value", ["many", "0", "-1", "1.5"])
def test_a_bad_value_is_an_error_that_names_its_variable(value: str) -> None:
    with pytest.raises(ConfigError, match="NIXLBUS_KV_BLOCKS") as caught:
        Settings.from_env({"NIXLBUS_KV_BLOCKS": value})
    assert caught.value.variable == "NIXLBUS_KV_BLOCKS"


def test_a_graph_s_name_can_not_widen_a_subject() -> None:
    with pytest.raises(InvalidIdentifier):
        Settings.from_env({"NIXLBUS_GRAPH": "vlm.>"})
