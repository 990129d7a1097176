package endpoint

import (
	"errors"
	"fmt"
	"math"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

// Limits bound what a container receives and sends. The zero value bounds nothing.
type Limits struct {
	In  Rate `json:"in,omitzero"`  // to the container
	Out Rate `json:"out,omitzero"` // from the container
}

// Rate is how much may pass.
type Rate struct {
	Bits  uint64 `json:"bits"`            // a second, at least MinRate; 0: as much as there is
	Burst uint64 `json:"burst,omitempty"` // bits that may pass at once after a pause; 0: what passes in 20 ms at the rate
}

// MinRate is the least rate that there is, in bits per second: at less, a bucket that holds the largest packet would take longer
// to fill than the kernel can say.
const MinRate = 8000

// shaperPrefix begins the name of the ifb device through which a limited container's traffic comes in. It is beside the
// link's end on the bridge.
const shaperPrefix = "ui"

// shaperDelay is how long a packet may wait for its turn before packets are dropped, in seconds.
const shaperDelay = 0.025

// ticksPerSecond is the unit of times in packet schedulers: the kernel's PSCHED_SHIFT is 6, for 64 ns.
const ticksPerSecond = 1e9 / 64

// ethernetHeader is what a frame has beyond a packet of the MTU, in bytes.
const ethernetHeader = 14

// limit bounds a link's traffic at its end on the bridge, where the container cannot change it. What the container sends
// arrives there, and arriving packets cannot be queued: they are led through an ifb device.
func (s *Segment) limit(l *Link, want Limits) error {
	if want == (Limits{}) {
		return nil
	}
	host, err := s.nl.LinkByName(l.HostName)
	if err != nil {
		return fmt.Errorf("find link %s: %w", l.HostName, err)
	}
	if err := s.shape(host, want.In); err != nil {
		return err
	}
	if want.Out.Bits == 0 {
		return nil
	}
	la := netlink.NewLinkAttrs()
	la.Name = l.shaperName()
	la.MTU = s.network.MTU()
	if err := s.nl.LinkAdd(&netlink.Ifb{LinkAttrs: la}); err != nil {
		return fmt.Errorf("add ifb %s: %w", la.Name, err)
	}
	shaper, err := s.nl.LinkByName(la.Name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", la.Name, err)
	}
	if err := s.shape(shaper, want.Out); err != nil {
		return err
	}
	if err := s.nl.LinkSetUp(shaper); err != nil {
		return fmt.Errorf("bring up %s: %w", la.Name, err)
	}
	return s.lead(host, shaper)
}

// lead sends what arrives on a link through shaper.
func (s *Segment) lead(host, shaper netlink.Link) error {
	ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: host.Attrs().Index,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_INGRESS,
	}}
	if err := s.nl.QdiscAdd(ingress); err != nil {
		return fmt.Errorf("add ingress qdisc to %s: %w", host.Attrs().Name, err)
	}
	// Without a selector u32 matches everything; the matchall classifier is not in every kernel.
	all := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: host.Attrs().Index, Parent: ingress.Handle, Priority: 1, Protocol: unix.ETH_P_ALL},
		RedirIndex:  shaper.Attrs().Index,
	}
	if err := s.nl.FilterAdd(all); err != nil {
		return fmt.Errorf("lead what arrives on %s to %s: %w", host.Attrs().Name, shaper.Attrs().Name, err)
	}
	return nil
}

// shape bounds what leaves by a link: a token bucket (tc-tbf(8)).
func (s *Segment) shape(link netlink.Link, r Rate) error {
	if r.Bits == 0 {
		return nil
	}
	rate, burst := float64(r.Bits)/8, float64(r.Burst)/8 // in bytes
	if burst == 0 {
		burst = rate / 50
	}
	// A packet that is larger than the bucket would never pass. The size of the bucket is told as the time that it takes
	// to fill.
	burst = max(burst, float64(s.network.MTU()+ethernetHeader))
	ticks := min(math.Ceil(burst/rate*ticksPerSecond), math.MaxUint32)
	bucket := &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       uint64(rate),
		Limit:      uint32(min(burst+rate*shaperDelay, math.MaxInt32)),
		Buffer:     uint32(ticks),
	}
	if err := s.nl.QdiscAdd(bucket); err != nil {
		return fmt.Errorf("add tbf qdisc to %s: %w", link.Attrs().Name, err)
	}
	return nil
}

func (l *Link) shaperName() string {
	return shaperPrefix + l.HostName[len(usernet.Endpoint{}.HostName()):]
}

// closeShaper deletes the ifb device of a link, if it has one.
func (l *Link) closeShaper() error {
	link, err := l.segment.nl.LinkByName(l.shaperName())
	if err == nil {
		err = l.segment.nl.LinkDel(link)
	}
	if err == nil || errors.As(err, &netlink.LinkNotFoundError{}) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("delete ifb %s: %w", l.shaperName(), err)
}
