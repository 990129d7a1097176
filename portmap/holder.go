package portmap

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/usernet/usernet"
)

// hostSocket is one line of /proc/net/tcp and its like, proc_net_tcp in the kernel's documentation.
type hostSocket struct {
	local     netip.AddrPort
	listening bool
	uid       uint32
	inode     uint64 // 0: no process has it any more
}

// processAt names the process whose socket keeps us from binding at: "nginx (pid 123)". Of a process that we may not
// look into it gives the user, and "" when there is none to be found.
func processAt(proto usernet.Proto, at netip.AddrPort) string {
	s, ok := socketAt(proto, at)
	if !ok {
		return ""
	}
	if pid, ok := processOf(s.inode); ok {
		comm, err := os.ReadFile("/proc/" + pid + "/comm")
		if err != nil {
			return "pid " + pid
		}
		return fmt.Sprintf("%s (pid %s)", bytes.TrimSpace(comm), pid)
	}
	if s.uid == overflowUID {
		return "a process of another user"
	}
	return fmt.Sprintf("a process of uid %d", s.uid)
}

// overflowUID stands for whoever has no number in our user namespace (kernel.overflowuid).
const overflowUID = 65534

// socketAt finds the socket in the way of at: a listening one before a connected one.
func socketAt(proto usernet.Proto, at netip.AddrPort) (found hostSocket, ok bool) {
	files := []string{string(proto), string(proto) + "6"}
	if at.Addr().Is6() {
		files = files[1:] // we bind with IPV6_V6ONLY: IPv4 sockets do not matter
	}
	for _, file := range files {
		b, err := os.ReadFile("/proc/thread-self/net/" + file)
		if err != nil {
			continue
		}
		for line := range bytes.Lines(b) {
			s, valid := parseSocket(string(line))
			if !valid || s.inode == 0 || s.local.Port() != at.Port() || !inTheWay(s.local.Addr(), at.Addr()) {
				continue
			}
			if !ok || s.listening && !found.listening {
				found, ok = s, true
			}
		}
	}
	return found, ok
}

// inTheWay reports whether a socket at has keeps another from being bound at want. A wildcard IPv6 socket may be
// one of both families; /proc does not tell.
func inTheWay(has, want netip.Addr) bool {
	return overlap(has.Unmap(), want.WithZone("")) || want.Is4() && has == netip.IPv6Unspecified()
}

// parseSocket reads one line; ok is false for the heading and for what is not a line of such a file.
func parseSocket(line string) (s hostSocket, ok bool) {
	const (
		local, state, uid, inode = 1, 3, 7, 9
		listen                   = "0A" // TCP_LISTEN
		unconnected              = "07" // TCP_CLOSE: a UDP socket without a peer
	)
	f := strings.Fields(line)
	if len(f) <= inode {
		return s, false
	}
	addr, port, _ := strings.Cut(f[local], ":")
	ip, err := parseHexAddr(addr)
	if err != nil {
		return s, false
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return s, false
	}
	owner, err := strconv.ParseUint(f[uid], 10, 32)
	if err != nil {
		return s, false
	}
	s.inode, err = strconv.ParseUint(f[inode], 10, 64)
	if err != nil {
		return s, false
	}
	s.local = netip.AddrPortFrom(ip, uint16(n))
	s.listening = f[state] == listen || f[state] == unconnected
	s.uid = uint32(owner)
	return s, true
}

// parseHexAddr reads an address as the kernel prints it there: each 32-bit word in the machine's byte order.
func parseHexAddr(s string) (netip.Addr, error) {
	b, err := hex.DecodeString(s)
	if err != nil {
		return netip.Addr{}, err
	}
	if len(b) != 4 && len(b) != 16 {
		return netip.Addr{}, fmt.Errorf("address %s: %w", s, usernet.ErrInvalid)
	}
	for w := 0; w < len(b); w += 4 {
		binary.NativeEndian.PutUint32(b[w:], binary.BigEndian.Uint32(b[w:]))
	}
	a, _ := netip.AddrFromSlice(b)
	return a, nil
}

// processOf finds a process that has the socket open.
func processOf(inode uint64) (pid string, ok bool) {
	want := fmt.Sprintf("socket:[%d]", inode)
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return "", false
	}
	for _, p := range procs {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		dir := "/proc/" + p.Name() + "/fd/"
		files, err := os.ReadDir(dir)
		if err != nil {
			continue // ended meanwhile, or not ours to look into
		}
		for _, f := range files {
			if target, err := os.Readlink(dir + f.Name()); err == nil && target == want {
				return p.Name(), true
			}
		}
	}
	return "", false
}
