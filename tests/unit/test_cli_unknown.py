"""The words of other tools are understood well enough to name ours."""

import pytest

from sysctr import cli


@pytest.mark.parametrize("word", cli._ELSEWHERE)
def test_the_word_of_another_tool_leads_to_a_command_that_there_is(word, capsys):
    meant = cli._ELSEWHERE[word]
    assert word not in cli.COMMANDS
    assert meant.split()[0] in cli.COMMANDS
    assert cli.main([word, "demo"]) == 2
    shown = capsys.readouterr().err
    assert f"cannot run `{word}`: no such command\nhint: here it is `sysctr {meant}`\n" in shown
