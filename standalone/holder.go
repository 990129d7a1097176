package standalone

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/dns"
	"github.com/usernet/usernet/internal/rights"
	"github.com/usernet/usernet/ipam"
)

// hold is a shared network's holder. It says on standard output that it is ready, or why not, and returns when the last
// command has left.
func hold() error {
	err := holdNetwork()
	if err != nil {
		fmt.Print(err) // after ready was said, nobody listens
	}
	return nil
}

func holdNetwork() error {
	var h holding
	if err := json.NewDecoder(os.Stdin).Decode(&h); err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	cfg := Config{
		Network: h.Network, Servers: h.Servers, NoEgress: h.NoEgress,
		Log:   slog.New(slog.DiscardHandler),
		Stdin: null, Stdout: null, Stderr: null,
	}
	in, err := startInner(cfg, holder, nil)
	if err != nil {
		return err
	}
	defer in.close()
	n, err := openNetwork(cfg, in)
	if err != nil {
		return err
	}
	defer n.close()
	os.Remove(h.At) // of a holder that was killed: whoever started us has the lock
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: h.At, Net: "unixpacket"})
	if err != nil {
		return err
	}
	defer l.Close()
	if err := os.Chmod(h.At, 0o600); err != nil {
		return err
	}
	s := &shared{network: n, inner: in, listener: l, lock: strings.TrimSuffix(h.At, ".sock") + ".lock", taken: map[netip.Addr]bool{}}
	fmt.Print(ready)
	os.Stdout.Close()
	return s.serve()
}

// shared is a network that commands join and leave.
type shared struct {
	network  *network
	inner    *innerProcess
	listener *net.UnixListener
	lock     string
	members  sync.WaitGroup

	mu     sync.Mutex
	count  int
	ended  bool
	serial int
	taken  map[netip.Addr]bool
}

// serve returns when the last member has left.
func (s *shared) serve() error {
	defer s.members.Wait()
	for {
		c, err := s.listener.AcceptUnix()
		if err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.ended {
				return nil
			}
			return err
		}
		s.mu.Lock()
		s.count++
		s.mu.Unlock()
		s.members.Go(func() {
			s.serveMember(c)
			c.Close()
			s.leave()
		})
	}
}

// leave ends the holder with its last member, unless another one is about to come, who has the lock.
func (s *shared) leave() {
	s.mu.Lock()
	s.count--
	last := s.count == 0
	s.mu.Unlock()
	if !last {
		return
	}
	lock, err := os.OpenFile(s.lock, os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		defer lock.Close()
		err = flock(lock, unix.LOCK_EX) // until whoever is coming has come
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count > 0 && err == nil {
		return
	}
	s.ended = true
	s.listener.Close() // which removes the socket, while nobody looks for it
}

// serveMember gives a command its place until its connection ends.
func (s *shared) serveMember(c *net.UnixConn) {
	var j join
	if _, err := rights.Receive(c, &j); err != nil {
		return
	}
	to, err := s.reserve(j)
	if err != nil {
		rights.Send(c, joined{Err: err.Error()})
		return
	}
	defer s.free(to)
	answer := joined{Network: s.network.cfg.Network, Addr4: to.Addr4, Addr6: to.Addr6, Inner: s.inner.cmd.Process.Pid}
	if err := rights.Send(c, answer); err != nil {
		return
	}
	var yes bool
	fds, err := rights.Receive(c, &yes)
	if err != nil || len(fds) != 1 {
		return
	}
	err = s.attach(to, fds[0])
	unix.Close(fds[0])
	release := func() {}
	if err == nil {
		release, err = s.network.publish("usernet run "+j.Name, j.Ports, to.Addr4, to.Addr6)
	}
	if err != nil {
		rights.Send(c, outcome{Err: err.Error()})
		return
	}
	defer release()
	if j.Name != "" {
		s.network.records.Set(to.ID, dns.Entry{Names: []string{j.Name}, Addrs: to.addrs()})
		defer s.network.records.Delete(to.ID)
	}
	if rights.Send(c, outcome{}) != nil {
		return
	}
	rights.Receive(c, &yes) // until it ends
}

func (a attachment) addrs() []netip.Addr {
	var as []netip.Addr
	for _, addr := range []netip.Addr{a.Addr4, a.Addr6} {
		if addr.IsValid() {
			as = append(as, addr)
		}
	}
	return as
}

// reserve chooses a command's addresses.
func (s *shared) reserve(j join) (attachment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serial++
	to := attachment{ID: fmt.Sprintf("m%d", s.serial)}
	for _, n := range s.network.cfg.Network.Subnets {
		want, own := j.Addr4, &to.Addr4
		if n.Prefix.Addr().Is6() {
			want, own = j.Addr6, &to.Addr6
		}
		a, err := want, error(nil)
		switch {
		case !want.IsValid():
			a, err = ipam.Next(n, func(a netip.Addr) bool { return s.taken[a] })
		case !n.Prefix.Contains(want):
			err = fmt.Errorf("%s is in no subnet of the network: %w", want, usernet.ErrInvalid)
		case s.taken[want] || want == n.Gateway:
			err = fmt.Errorf("address %s: %w", want, usernet.ErrExists)
		}
		if err != nil {
			return to, err
		}
		*own = a
	}
	for _, a := range to.addrs() {
		s.taken[a] = true
	}
	return to, nil
}

func (s *shared) free(to attachment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range to.addrs() {
		delete(s.taken, a)
	}
}

// attach has the inner process put a command's namespace on the fabric.
func (s *shared) attach(to attachment, netns int) error {
	s.inner.mu.Lock()
	defer s.inner.mu.Unlock()
	if err := rights.Send(s.inner.control, note{Attach: &to}, netns); err != nil {
		return err
	}
	var o outcome
	if _, err := rights.Receive(s.inner.control, &o); err != nil {
		return err
	}
	if o.Err != "" {
		return errors.New(o.Err)
	}
	return nil
}
