//go:build !unix

package l2

import (
	"context"
	"errors"
	"fmt"
)

// AwaitPeer is for systems that have datagram sockets with names.
func AwaitPeer(_ context.Context, c PacketConn, _ Options) (*Link, error) {
	return nil, fmt.Errorf("wait for a datagram on %s: %w", c.LocalAddr(), errors.ErrUnsupported)
}
