package standalone

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/rights"
)

// A shared network is held by a process of its own, the holder, which the first command starts and which ends with the
// last one. Each command keeps a connection to it; what the connection's end takes with it is the command's place.

// join is what a command tells the holder, with its namespace in a second message.
type join struct {
	Name         string     // what the others may call it; "": nothing
	Addr4, Addr6 netip.Addr // wanted; zero: any
	Ports        []usernet.Port
}

// joined is the holder's answer.
type joined struct {
	Network      usernet.Network
	Addr4, Addr6 netip.Addr
	Inner        int    // process ID of the holder's inner process, whose user namespace the command's has to be in
	Err          string `json:",omitempty"`
}

var validName = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z_.-]{0,62}$`)

// shareDir is where the user's shared networks are found.
func shareDir() (string, error) {
	base := os.Getenv("XDG_RUNTIME_DIR")
	switch {
	case base != "":
	case os.Geteuid() == 0:
		base = "/run"
	default:
		base = filepath.Join(os.TempDir(), fmt.Sprintf("usernet-%d", os.Geteuid()))
		if err := os.MkdirAll(base, 0o700); err != nil {
			return "", err
		}
		// Somebody else may have been faster, who could then put another socket in place of ours.
		if err := ownDir(base); err != nil {
			return "", err
		}
	}
	dir := filepath.Join(base, "usernet", "share")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	return dir, ownDir(dir)
}

// ownDir tells whether dir is a directory, not a link to one, that nobody but the user may write in.
func ownDir(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Uid != uint32(os.Geteuid()) || st.Mode&0o022 != 0 {
		return fmt.Errorf("%s is not a directory of the user's own", dir)
	}
	return nil
}

// runShared is Run on a shared network.
func runShared(cfg Config) (status syscall.WaitStatus, err error) {
	if !validName.MatchString(cfg.Share) {
		return 0, fmt.Errorf("network name %q: want letters, digits, '.', '_' and '-': %w", cfg.Share, usernet.ErrInvalid)
	}
	holder, j, err := joinHolder(cfg)
	if err != nil {
		return 0, err
	}
	defer holder.Close()
	cfg.Network, cfg.Addr4, cfg.Addr6 = j.Network, j.Addr4, j.Addr6
	in, err := startInner(cfg, member, func(cmd *exec.Cmd) error { return enterUser(cmd, j.Inner) })
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, in.close()) }()
	var o outcome
	fds, err := rights.Receive(in.control, &o)
	switch {
	case err != nil:
		return 0, err
	case o.Err != "":
		return 0, errors.New(o.Err)
	case len(fds) != 1:
		return 0, errors.New("the inner process has no namespace")
	}
	err = rights.Send(holder, true, fds[0])
	unix.Close(fds[0])
	if err == nil {
		_, err = rights.Receive(holder, &o)
	}
	if err != nil {
		return 0, fmt.Errorf("join network %s: %w", cfg.Share, err)
	}
	if o.Err != "" {
		return 0, errors.New(o.Err)
	}
	defer in.passSignals()()
	return in.wait()
}

// enterUser has the command begin in the user namespace of the process pid. A Go process cannot enter one; nsenter(1),
// of util-linux, can. Root has none.
func enterUser(cmd *exec.Cmd, pid int) error {
	if os.Geteuid() == 0 {
		return nil
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return fmt.Errorf("share a network: %w (of util-linux)", err)
	}
	exe, err := os.Executable() // /proc/self would be nsenter
	if err != nil {
		return err
	}
	cmd.Path = nsenter
	cmd.Args = []string{nsenter, "--user=/proc/" + strconv.Itoa(pid) + "/ns/user", "--preserve-credentials", "--",
		"unshare", "--net", "--mount", "--propagation", "slave", "--", exe, innerCommand}
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	return nil
}

// joinHolder finds the network's holder or starts it, and joins. The lock is held meanwhile: the holder does not end, and
// no second one is started.
func joinHolder(cfg Config) (*net.UnixConn, *joined, error) {
	dir, err := shareDir()
	if err != nil {
		return nil, nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, cfg.Share+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, nil, err
	}
	defer lock.Close()
	if err := flock(lock, unix.LOCK_EX); err != nil {
		return nil, nil, err
	}
	at := filepath.Join(dir, cfg.Share+".sock")
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: at, Net: "unixpacket"})
	if err != nil {
		if err := startHolder(cfg, at); err != nil {
			return nil, nil, err
		}
		if conn, err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: at, Net: "unixpacket"}); err != nil {
			return nil, nil, fmt.Errorf("call the holder of network %s: %w", cfg.Share, err)
		}
	}
	var j joined
	if err = rights.Send(conn, join{Name: cfg.Hostname, Addr4: cfg.Addr4, Addr6: cfg.Addr6, Ports: cfg.Ports}); err == nil {
		_, err = rights.Receive(conn, &j)
	}
	if err == nil && j.Err != "" {
		err = errors.New(j.Err)
	}
	if err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("join network %s: %w", cfg.Share, err)
	}
	return conn, &j, nil
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err != unix.EINTR {
			return os.NewSyscallError("flock", err)
		}
	}
}

// holding is what a holder is told by its standard input.
type holding struct {
	At       string
	Network  usernet.Network
	Servers  []netip.AddrPort
	NoEgress bool
}

// startHolder starts a holder and returns when it can be called. It lives on when this process ends.
func startHolder(cfg Config, at string) error {
	told, err := json.Marshal(holding{At: at, Network: cfg.Network, Servers: cfg.Servers, NoEgress: cfg.NoEgress})
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", holderCommand)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = "/"
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", holderCommand, err)
	}
	defer cmd.Process.Release()
	in.Write(told)
	in.Close()
	answer, err := io.ReadAll(out) // until the holder closes it
	out.Close()
	if err == nil && string(answer) != ready {
		err = errors.New(string(answer))
	}
	if err != nil {
		cmd.Wait()
	}
	return err
}

const ready = "ready"
