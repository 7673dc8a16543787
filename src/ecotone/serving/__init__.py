"""What stands between a deployed session and its users: sources of inputs, preparation, results, and the HTTP server."""
