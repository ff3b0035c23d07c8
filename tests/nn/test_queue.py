import torch

from sslcli.nn.queue import Queue


def test_starts_with_random_directions_that_the_seed_fixes():
    torch.manual_seed(3)
    a = Queue(7, 5)
    torch.manual_seed(3)
    b = Queue(7, 5)
    torch.testing.assert_close(a.rows.norm(dim=1), torch.ones(7))
    assert torch.equal(a.rows, b.rows)
    assert a.pointer == 0


def test_the_newest_rows_replace_the_oldest_and_wrap():
    queue = Queue(5, 1)
    queue.push(torch.tensor([[1.0], [2.0], [3.0]]))
    queue.push(torch.tensor([[4.0], [5.0], [6.0]]))  # 5 is no multiple of 3
    assert queue.rows.flatten().tolist() == [6, 2, 3, 4, 5]
    assert queue.pointer == 1
    queue.push(torch.tensor([[7.0], [8.0], [9.0], [10.0], [11.0]]))  # a whole turn
    assert queue.rows.flatten().tolist() == [11, 7, 8, 9, 10]
    assert queue.pointer == 1


def test_all_it_remembers_is_in_its_state():
    queue, other = Queue(6, 2), Queue(6, 2)
    queue.push(torch.randn(4, 2))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(torch.ones(3, 2))
    assert torch.equal(queue.rows, other.rows)
    assert queue.pointer == other.pointer == 1


def test_half_precision_rows_are_kept_in_the_queues_precision():
    queue = Queue(4, 2)
    queue.push(torch.ones(2, 2, dtype=torch.bfloat16))
    assert queue.rows.dtype == torch.float32
