"""Tests of the protocol over gRPC."""
