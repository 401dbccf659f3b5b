"""YAML without code, with the numbers that people write."""

import math

import pytest

from dckd_sr import safe_yaml


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1e-4', 1e-4),
        ('5e3', 5000.0),
        ('-1E+2', -100.0),
        ('.5e1', 5.0),
        ('255.', 255.0),
        ('!!float 1e-4', 1e-4),
        ('!!float 5e3', 5000.0),
        ('-1', -1),
        ('.inf', math.inf),
        ('~', None),
        ('true', True),
        ("'1e-4'", '1e-4'),
        ('1e', '1e'),
        ('e5', 'e5'),
        ('2024-01-31', '2024-01-31'),
        ('[1, 1e-3, a]', [1, 1e-3, 'a']),
        ('{a: {b: 1}}', {'a': {'b': 1}}),
        ('a: &x {k: 1}\nb: {<<: *x, j: 2}', {'a': {'k': 1}, 'b': {'k': 1, 'j': 2}}),
        ('a: &x {k: 1}\nb: {<<: *x, k: 2}', {'a': {'k': 1}, 'b': {'k': 2}}),
        ('', None),
        ('# only a comment', None),
    ],
)
def test_values(text, value):
    result = safe_yaml.parse(text)
    assert result == value and type(result) is type(value)


def test_aliases_are_copies():
    value = safe_yaml.parse('a: &x {k: [1]}\nb: *x')
    value['a']['k'].append(2)
    assert value['b'] == {'k': [1]}


@pytest.mark.parametrize(
    ('text', 'problems'),
    [
        (
            "a: 1\nb: !!python/object/apply:os.system ['touch hacked']",
            ['line 2: the tag !!python/object/apply:os.system'],
        ),
        ('a: !!python/name:os.system', ['line 1: the tag !!python/name:os.system']),
        ('a: !mine 1\nb: !!set {x}', ['line 1: the tag !mine', 'line 2: the tag !!set']),
        ('a: 1\nb:\n  c: 1\n  c: 2\na: 3', ["line 5: the key 'a' is already set in line 1", "line 4: the key 'c'"]),
        ('1: a', ["line 1: the key '1' is not text"]),
        ('on: a', ["line 1: the key 'on' is not text"]),
        ('[a]: 1', ['line 1: the key']),
        ('a: !!float b', ["line 1: 'b' is not of the type !!float"]),
        ('a: !!int 1.5', ["line 1: '1.5' is not of the type !!int"]),
        ('a: &x [*x]', ['line 1: this block contains itself']),
        ('a: 1\n\tb: 2', ['line 2, column 1']),
        ('a: [1, 2\nb: 3', ['line 2']),
        ('a: 1\n---\nb: 2', ['line 2']),
        ('a: \x00', ['']),
    ],
)
def test_refused(text, problems, tmp_path):
    with pytest.raises(safe_yaml.YAMLError) as error:
        safe_yaml.parse(text)
    assert len(error.value.problems) == len(problems)
    for problem in problems:
        assert any(line.startswith(problem) for line in error.value.problems), error.value.problems
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('text', 'start'),
    [
        (r'a: "D:\data\HR"', 'line 1, column 7: found unknown escape character: in double quotes'),
        (r'a: "C:\Users\me"', 'line 1, column 9: '),
        (r'a: "C:\x"', 'line 1, column 9: '),
        (r'a: "..\data"', 'line 1, column 7: found unknown escape character: in double quotes'),
        ('é: 1\nb: [x, "C:\\new\\train\\best"]', r'line 2: "C:\new\train\best": in double quotes'),
        (r'a: "c:\t"', r'line 1: "c:\t": in double quotes'),
    ],
)
def test_windows_paths_in_double_quotes(text, start):
    with pytest.raises(safe_yaml.YAMLError) as error:
        safe_yaml.parse(text)
    (problem,) = error.value.problems
    assert problem.startswith(start) and problem.endswith('use single quotes, or / in the place of \\')


@pytest.mark.parametrize('text', [r"'C:\new'", r'C:\new', r'"C:\\new"', r'"C:/new"', r'"\\\\host\\new"'])
def test_windows_paths_that_are_fine(text):
    assert '\n' not in safe_yaml.parse(f'a: {text}')['a']


def test_dump_and_parse_are_inverse():
    value = {'b': 1e-7, 'a': [1, None, True, '1e-4', 'é', '~', 'on', '{}x4'], 'c': {}}
    text = safe_yaml.dump(value)
    assert safe_yaml.parse(text) == value and list(safe_yaml.parse(text)) == ['b', 'a', 'c']


def test_a_text_of_too_many_levels_or_values_does_not_end_the_process():
    assert safe_yaml.is_yaml('[' * 100000)
    for text, expected in (('[' * 100000, 'more than 100 levels'), ('a: &a [1, 2]\nb: &b [*a, *a]\n', None)):
        if expected is None:
            assert safe_yaml.parse(text)['b'] == [[1, 2], [1, 2]]
        else:
            with pytest.raises(safe_yaml.YAMLError, match=expected):
                safe_yaml.parse(text)
    for text in ('- ' * 5000, '? ' * 5000, 'a: ' + '{b: ' * 2000, '[' * 1500 + ']' * 1500, 'a: 1\nb: ' + '[' * 100000):
        line = 1 + text.count('\n')
        with pytest.raises(safe_yaml.YAMLError) as error:
            safe_yaml.parse(text)
        assert error.value.problems == [f'line {line}: more than 100 levels'] and safe_yaml.is_yaml(text)
    bomb = 'a0: &a0 [1, 1]\n' + ''.join(f'a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n' for n in range(1, 30))
    with pytest.raises(safe_yaml.YAMLError, match='more than 100000 values'):
        safe_yaml.parse(bomb)


def test_a_problem_is_one_line():
    with pytest.raises(safe_yaml.YAMLError) as error:
        safe_yaml.parse('a: !!int "x\\ny"\n"b\\nc": 1\n"b\\nc": 2\n')
    assert len(error.value.problems) == 2 and all(problem.isprintable() for problem in error.value.problems)
