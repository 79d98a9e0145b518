"""The HTTP protocols of the service; each module translates one protocol to the core and back."""
