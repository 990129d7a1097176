package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
)

// upstreamEvery is how often the adapters are asked for their resolvers.
const upstreamEvery = 10 * time.Second

// resolvers are those of the host, as its adapters have them.
type resolvers struct {
	servers []netip.AddrPort // of the adapter with the lowest metric first
	search  []string
}

// upstream are the host's resolvers.
type upstream struct {
	now *atomic.Pointer[resolvers]
	log *slog.Logger
}

func newUpstream(log *slog.Logger) upstream {
	u := upstream{now: new(atomic.Pointer[resolvers]), log: log}
	u.now.Store(&resolvers{})
	u.look()
	return u
}

// Servers are the resolvers, the preferred one first.
func (u upstream) Servers() []netip.AddrPort { return u.now.Load().servers }

// Search are the domains in which the host looks for names.
func (u upstream) Search() []string { return u.now.Load().search }

// Run looks for changes until ctx is done.
func (u upstream) Run(ctx context.Context) error {
	tick := time.NewTicker(upstreamEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			u.look()
		}
	}
}

// look keeps what was known when there are no resolvers, as for a moment when networks change.
func (u upstream) look() {
	found, err := hostResolvers()
	if err != nil {
		u.log.Warn("cannot read the host's resolvers", "err", err)
		return
	}
	if len(found.servers) > 0 {
		u.now.Store(&found)
	}
}

func hostResolvers() (resolvers, error) {
	list, err := adapters()
	if err != nil {
		return resolvers{}, fmt.Errorf("list adapters: %w", err)
	}
	slices.SortStableFunc(list, func(a, b *windows.IpAdapterAddresses) int { return cmp.Compare(a.Ipv4Metric, b.Ipv4Metric) })
	var r resolvers
	for _, a := range list {
		if a.OperStatus != windows.IfOperStatusUp {
			continue
		}
		for s := a.FirstDnsServerAddress; s != nil; s = s.Next {
			addr, ok := netip.AddrFromSlice(s.Address.IP())
			// Windows lists the site-local fec0:0:0:ffff::1 to 3 where nobody has set any.
			if at := netip.AddrPortFrom(addr.Unmap(), 53); ok && !siteLocal(addr) && !slices.Contains(r.servers, at) {
				r.servers = append(r.servers, at)
			}
		}
		if domain := windows.UTF16PtrToString(a.DnsSuffix); domain != "" && !slices.Contains(r.search, strings.ToLower(domain)) {
			r.search = append(r.search, strings.ToLower(domain))
		}
	}
	return r, nil
}

func siteLocal(a netip.Addr) bool {
	return netip.MustParsePrefix("fec0::/10").Contains(a)
}

// adapters asks until there is room for the answer (GetAdaptersAddresses, ERROR_BUFFER_OVERFLOW).
func adapters() ([]*windows.IpAdapterAddresses, error) {
	const flags = windows.GAA_FLAG_SKIP_UNICAST | windows.GAA_FLAG_SKIP_ANYCAST | windows.GAA_FLAG_SKIP_MULTICAST
	for size := uint32(16 << 10); ; {
		buf := make([]uint64, size/8+1) // aligned
		first := (*windows.IpAdapterAddresses)(unsafe.Pointer(&buf[0]))
		err := windows.GetAdaptersAddresses(windows.AF_UNSPEC, flags, 0, first, &size)
		if errors.Is(err, windows.ERROR_BUFFER_OVERFLOW) {
			continue
		}
		if errors.Is(err, windows.ERROR_NO_DATA) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		var list []*windows.IpAdapterAddresses
		for a := first; a != nil; a = a.Next {
			list = append(list, a)
		}
		return list, nil
	}
}
