//go:build unix && !linux

package l2

// disconnect does nothing: here the end of a peer disconnects its datagram socket.
func disconnect(int) error { return nil }
