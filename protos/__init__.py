"""Protocol buffers and gRPC stubs of Outrider, generated from the .proto files beside them."""
