"""Open Inference Protocol over gRPC. Only `port` works without the extra `grpc`."""
