package l2

import (
	"encoding/binary"
	"fmt"
	"io"
)

// The messages with which HyperKit opens a connection to VPNKit. Ours begin at once behind them.
const (
	vpnkitInitLen    = 49 // magic "VMN3T", version, commit: sent back as it came
	vpnkitCommandLen = 41 // a byte that says Ethernet, the machine's UUID as text, an address it would like
	vpnkitReplyLen   = 258
	vpnkitUUIDLen    = 36
)

// HandshakeVPNKit does the server's part of the handshake on a connection of HyperKit's, and reads not a byte more. mac chooses
// the machine's address by its UUID, which is as it was sent: any 36 bytes; its error ends the handshake.
func HandshakeVPNKit(c io.ReadWriter, mtu int, mac func(uuid string) (MAC, error)) (MAC, error) {
	var hello [vpnkitInitLen]byte
	if _, err := io.ReadFull(c, hello[:]); err != nil {
		return MAC{}, fmt.Errorf("read hyperkit's init message: %w", err)
	}
	if _, err := c.Write(hello[:]); err != nil {
		return MAC{}, fmt.Errorf("answer hyperkit's init message: %w", err)
	}
	var command [vpnkitCommandLen]byte
	if _, err := io.ReadFull(c, command[:]); err != nil {
		return MAC{}, fmt.Errorf("read hyperkit's command: %w", err)
	}
	uuid := string(command[1:][:vpnkitUUIDLen])
	m, err := mac(uuid)
	if err != nil {
		return MAC{}, fmt.Errorf("machine %q: %w", uuid, err)
	}
	reply := make([]byte, vpnkitReplyLen)
	reply[0] = 1 // success
	binary.LittleEndian.PutUint16(reply[1:], uint16(mtu))
	binary.LittleEndian.PutUint16(reply[3:], uint16(min(mtu+headerLen, 65535)))
	copy(reply[5:], m[:])
	if _, err := c.Write(reply); err != nil {
		return MAC{}, fmt.Errorf("answer hyperkit's command: %w", err)
	}
	return m, nil
}
