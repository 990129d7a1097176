package endpoint

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
)

// settleTimeout bounds the wait for a link that, for whatever reason, does not come up.
const settleTimeout = 2 * time.Second

// settle waits until the bridge's end of a link, whose other end was brought up last, sends, and the bridge, whose first
// port that may be. A veth has carrier from its second end on, a bridge from its first port on, and the kernel lets them know
// in its own time (linkwatch). Until then they drop what is to be sent: the answer to a container's first ARP request,
// which is repeated after a second.
func (s *Segment) settle(l *Link) error {
	port, err := s.nl.LinkByName(l.HostName)
	if err != nil {
		return fmt.Errorf("find link %s: %w", l.HostName, err)
	}
	for _, index := range []int{port.Attrs().Index, s.bridge} {
		// Since Linux 6.9 the question is what hurries it (rtnl_getlink, linkwatch_sync_dev).
		sends, err := s.sends(index)
		if err == nil && !sends {
			err = s.awaitUp(index)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// awaitUp waits until a link can send. It is for its users to complain of one that does not come up in time.
func (s *Segment) awaitUp(index int) error {
	ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
	defer cancel()
	updates := make(chan netlink.LinkUpdate, 64)
	if err := s.ns.Do(func() error { return netlink.LinkSubscribe(updates, ctx.Done()) }); err != nil {
		return fmt.Errorf("watch links: %w", err)
	}
	sends, err := s.sends(index)
	if sends || err != nil { // it came up before the watch began
		cancel()
	}
	for u := range updates { // closed when ctx is done
		if u.Attrs().Index == index && u.Attrs().OperState == netlink.OperUp {
			cancel()
		}
	}
	return err
}

func (s *Segment) sends(index int) (bool, error) {
	link, err := s.nl.LinkByIndex(index)
	if err != nil {
		return false, fmt.Errorf("look at link %d: %w", index, err)
	}
	down := link.Attrs().Flags&net.FlagUp == 0 // a bridge that is somebody else's: nothing to wait for
	return down || link.Attrs().OperState == netlink.OperUp, nil
}
