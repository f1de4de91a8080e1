import os
import socket

import pytest
import torch


def test_a_connection_that_leaves_the_machine_is_refused():
    with socket.socket() as client, pytest.raises(RuntimeError, match=r"192\.0\.2\.1"):
        client.connect(("192.0.2.1", 80))


def test_a_name_outside_the_machine_is_not_looked_up():
    with pytest.raises(RuntimeError, match=r"example\.org"):
        socket.create_connection(("example.org", 80))


def test_loopback_is_reachable():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_no_setting_reaches_a_test_from_outside():
    assert [name for name in os.environ if name.startswith("BALLAST_")] == []


def test_torch_runs_on_one_thread():
    assert torch.get_num_threads() == 1
