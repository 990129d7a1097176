//go:build !linux

package tcprelay

import "net/netip"

// dial connects to dst.
func (t *Relays) dial(dst netip.AddrPort) (conn, error) {
	return t.dialer.DialContext(t.ctx, "tcp", dst.String())
}
