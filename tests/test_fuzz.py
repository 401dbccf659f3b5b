"""A short fuzz, always the same; `make fuzz` draws more. And the fuzz itself notices what it is there for."""

import time
from pathlib import Path

import fuzz
import pytest


@pytest.fixture(scope='module')
def sandbox(tmp_path_factory):
    return fuzz.Sandbox(tmp_path_factory.mktemp('fuzz'))


@pytest.fixture(autouse=True)
def _inside(sandbox, monkeypatch):
    monkeypatch.chdir(sandbox.work)


def test_option_files(sandbox):
    options_property, *_ = fuzz.properties(sandbox)
    fuzz.settings(600, derandomize=True)(options_property)()


def test_images(sandbox):
    _, images_property, _ = fuzz.properties(sandbox)
    fuzz.settings(200, derandomize=True)(images_property)()


def test_what_is_shown(sandbox):
    *_, display_property = fuzz.properties(sandbox)
    fuzz.settings(200, derandomize=True)(display_property)()


def test_the_files_it_starts_from_work(sandbox):
    for command, opt in sandbox.bases.values():
        assert fuzz.try_options(sandbox, command, fuzz.safe_yaml.dump(opt)) == 0


@pytest.mark.parametrize(
    'body, expected',
    [
        (lambda arguments: {}['bug'], 'bug'),
        (lambda arguments: time.sleep(5), 'more than'),
        (lambda arguments: 1, 'exit code 1'),
        (lambda arguments: 2, 'not one error'),  # and nothing said
        (lambda arguments: bool(Path('elsewhere').write_text('')), 'written outside'),
        (lambda arguments: bool(Path('../elsewhere').mkdir()), 'written outside'),
        (lambda arguments: bool(Path('HR/1.png').unlink()), 'written outside'),
    ],
)
def test_it_notices(body, expected, sandbox, monkeypatch):
    monkeypatch.setattr(fuzz, 'LIMIT', 0.5)
    monkeypatch.setattr(fuzz.train, 'main', body)
    with pytest.raises((AssertionError, KeyError), match=expected):
        sandbox.run('train')
    sandbox.restore()
    folder = sandbox.root / 'elsewhere'
    if folder.is_dir():
        folder.rmdir()


def test_what_a_run_writes_is_seen_wherever_it_is(sandbox, monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz.train, 'main', lambda arguments: bool((tmp_path / 'far').write_text('')))
    with pytest.raises(AssertionError, match='far'):
        sandbox.run('train')
