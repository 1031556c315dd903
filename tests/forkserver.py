"""The last that the server of forked processes imports: they begin with all of it, and do not look through it."""

from tests.pool import seldom_look_for_garbage

seldom_look_for_garbage()
