"""Talking to peers: the only part of Blyan that knows libp2p.

Services depend on `interface.PeerNetwork`; `network.Network` is the real one, and
`blyan_node.testing.network.TwinNetwork` its twin inside one process.
"""
