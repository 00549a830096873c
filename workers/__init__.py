"""Workers: processes of an inference graph, each with typed endpoints on the bus, and the commands that run them."""
