// Package libnetwork is Docker's door: it serves the remote network driver protocol of Docker 20.10 to 29, JSON over
// HTTP, and turns each request into a checked value and a call of the driver. It keeps nothing and sets nothing up.
//
// The protocol: moby/moby, daemon/libnetwork/docs/remote.md and daemon/libnetwork/drivers/remote.
package libnetwork

import (
	"context"
	"errors"
	"log/slog"
	"net/http"

	"github.com/gorilla/mux"

	"github.com/usernet/usernet"
)

// Networks has the networks.
type Networks interface {
	CreateNetwork(ctx context.Context, n usernet.Network) error
	DeleteNetwork(ctx context.Context, networkID string) error
}

// Endpoints has the endpoints. CreateEndpoint returns its argument with the addresses and the MAC filled in that it lacked.
type Endpoints interface {
	CreateEndpoint(ctx context.Context, ep usernet.Endpoint) (usernet.Endpoint, error)
	DeleteEndpoint(ctx context.Context, networkID, endpointID string) error
}

// Sandboxes connects endpoints to containers. sandboxKey is the path of the container's network namespace, which need not
// exist yet.
type Sandboxes interface {
	Join(ctx context.Context, networkID, endpointID, sandboxKey string) (usernet.Attachment, error)
	Leave(ctx context.Context, networkID, endpointID string) error
}

// Ports publishes ports. Publish replaces whatever the endpoint had published.
type Ports interface {
	Publish(ctx context.Context, networkID, endpointID string, ports []usernet.Port) error
	Unpublish(ctx context.Context, networkID, endpointID string) error
}

// Driver is what the door opens to. Its methods may be called at the same time and repeatedly; from those that take
// something away, usernet.ErrNotFound counts as success.
type Driver interface {
	Networks
	Endpoints
	Sandboxes
	Ports
}

type door struct {
	driver   Driver
	defaults map[string]string
}

// Handler serves the protocol with d. defaults are options of every network that does not give them; log gets a line
// for each request.
func Handler(d Driver, defaults map[string]string, log *slog.Logger) http.Handler {
	door := &door{d, defaults}
	// SkipClean, because Docker does not follow the redirect that an unclean path would get.
	r := mux.NewRouter().SkipClean(true)
	r.NotFoundHandler = refuse(http.StatusNotFound)
	r.MethodNotAllowedHandler = refuse(http.StatusMethodNotAllowed)
	for path, h := range map[string]http.Handler{
		"/Plugin.Activate":                           constant(Manifest{Implements: []string{"NetworkDriver"}}),
		"/NetworkDriver.GetCapabilities":             constant(Capabilities{Scope: "local", ConnectivityScope: "local", GwAllocChecker: true}),
		"/NetworkDriver.GwAllocCheck":                call(log, door.gwAllocCheck),
		"/NetworkDriver.AllocateNetwork":             call(log, allocateNetwork),
		"/NetworkDriver.FreeNetwork":                 call(log, nothing[FreeNetworkRequest]),
		"/NetworkDriver.CreateNetwork":               call(log, door.createNetwork),
		"/NetworkDriver.DeleteNetwork":               call(log, door.deleteNetwork),
		"/NetworkDriver.CreateEndpoint":              call(log, door.createEndpoint),
		"/NetworkDriver.DeleteEndpoint":              call(log, door.deleteEndpoint),
		"/NetworkDriver.EndpointOperInfo":            call(log, endpointInfo),
		"/NetworkDriver.Join":                        call(log, door.join),
		"/NetworkDriver.Leave":                       call(log, door.leave),
		"/NetworkDriver.ProgramExternalConnectivity": call(log, door.publish),
		"/NetworkDriver.RevokeExternalConnectivity":  call(log, door.unpublish),
		"/NetworkDriver.DiscoverNew":                 call(log, nothing[Discovery]),
		"/NetworkDriver.DiscoverDelete":              call(log, nothing[Discovery]),
	} {
		r.Handle(path, h).Methods(http.MethodPost)
	}
	return r
}

// gwAllocCheck is the first that Docker 28 and later ask about a new network, so wrong options are refused here. The
// network owns its gateway address even where it is internal: containers reach the resolver, and bridge networks the
// host, on it. Only where nothing would have the address and no route would lead to it is it left to the containers.
func (d *door) gwAllocCheck(_ context.Context, req GwAllocCheckRequest) (GwAllocCheckResponse, error) {
	var n usernet.Network
	if err := networkOptions(&n, req.Options, d.defaults); err != nil {
		return GwAllocCheckResponse{}, err
	}
	return GwAllocCheckResponse{SkipIPv4: n.Internal && n.Options.InhibitHostIP}, nil
}

// allocateNetwork is for swarm managers, who do not ask a driver of local scope. There is nothing to allocate.
func allocateNetwork(_ context.Context, req AllocateRequest) (AllocateResponse, error) {
	return AllocateResponse{Options: req.Options}, nil
}

// nothing serves what concerns drivers of global scope only.
func nothing[Req any](context.Context, Req) (empty, error) { return empty{}, nil }

func (d *door) createNetwork(ctx context.Context, req CreateNetworkRequest) (empty, error) {
	n, err := networkOf(req, d.defaults)
	if err != nil {
		return empty{}, err
	}
	return empty{}, d.driver.CreateNetwork(ctx, n)
}

func (d *door) deleteNetwork(ctx context.Context, req DeleteNetworkRequest) (empty, error) {
	if err := checkID("network", req.NetworkID); err != nil {
		return empty{}, err
	}
	return empty{}, gone(d.driver.DeleteNetwork(context.WithoutCancel(ctx), req.NetworkID))
}

func (d *door) createEndpoint(ctx context.Context, req CreateEndpointRequest) (CreateEndpointResponse, error) {
	asked, err := endpointOf(req)
	if err != nil {
		return CreateEndpointResponse{}, err
	}
	ep, err := d.driver.CreateEndpoint(ctx, asked)
	if err != nil {
		return CreateEndpointResponse{}, err
	}
	// Docker takes a field that it had set itself for an attempt to change it, even to the same value.
	var ifc EndpointInterface
	if !asked.Addr4.IsValid() && ep.Addr4.IsValid() {
		ifc.Address = ep.Addr4.String()
	}
	if !asked.Addr6.IsValid() && ep.Addr6.IsValid() {
		ifc.AddressIPv6 = ep.Addr6.String()
	}
	if asked.MAC == nil {
		ifc.MacAddress = ep.MAC.String()
	}
	return CreateEndpointResponse{Interface: &ifc}, nil
}

func (d *door) deleteEndpoint(ctx context.Context, req DeleteEndpointRequest) (empty, error) {
	if err := checkIDs(req.NetworkID, req.EndpointID); err != nil {
		return empty{}, err
	}
	return empty{}, gone(d.driver.DeleteEndpoint(context.WithoutCancel(ctx), req.NetworkID, req.EndpointID))
}

// endpointInfo has nothing to tell: Docker cannot show what a remote driver publishes (moby/libnetwork#2451). It must not
// fail either, because a daemon that starts asks about every live endpoint.
func endpointInfo(context.Context, InfoRequest) (InfoResponse, error) {
	return InfoResponse{Value: map[string]any{}}, nil
}

func (d *door) join(ctx context.Context, req JoinRequest) (JoinResponse, error) {
	if err := checkIDs(req.NetworkID, req.EndpointID); err != nil {
		return JoinResponse{}, err
	}
	if err := sandboxOf(req.SandboxKey); err != nil {
		return JoinResponse{}, err
	}
	a, err := d.driver.Join(ctx, req.NetworkID, req.EndpointID, req.SandboxKey)
	if err != nil {
		return JoinResponse{}, err
	}
	return joined(a), nil
}

func joined(a usernet.Attachment) JoinResponse {
	res := JoinResponse{
		InterfaceName: &InterfaceName{SrcName: a.SrcName, DstName: a.DstName, DstPrefix: a.DstPrefix},
		// A network without a way out is so on purpose: without this, Docker would add one of its own (docker_gwbridge).
		// With a gateway it must be false, or Docker does not see that there is one.
		DisableGatewayService: !a.Gateway4.IsValid() && !a.Gateway6.IsValid(),
	}
	if a.Gateway4.IsValid() {
		res.Gateway = a.Gateway4.String()
	}
	if a.Gateway6.IsValid() {
		res.GatewayIPv6 = a.Gateway6.String()
	}
	for _, r := range a.Routes {
		if !r.Destination.IsValid() {
			continue // would stop dockerd
		}
		route := StaticRoute{Destination: r.Destination.String(), RouteType: 1}
		if r.NextHop.IsValid() {
			route.RouteType, route.NextHop = 0, r.NextHop.String()
		}
		res.StaticRoutes = append(res.StaticRoutes, route)
	}
	return res
}

func (d *door) leave(ctx context.Context, req LeaveRequest) (empty, error) {
	if err := checkIDs(req.NetworkID, req.EndpointID); err != nil {
		return empty{}, err
	}
	return empty{}, gone(d.driver.Leave(context.WithoutCancel(ctx), req.NetworkID, req.EndpointID))
}

func (d *door) publish(ctx context.Context, req ConnectivityRequest) (empty, error) {
	if err := checkIDs(req.NetworkID, req.EndpointID); err != nil {
		return empty{}, err
	}
	ports, err := portsOf(req.Options)
	if err != nil {
		return empty{}, err
	}
	return empty{}, d.driver.Publish(ctx, req.NetworkID, req.EndpointID, ports)
}

func (d *door) unpublish(ctx context.Context, req RevokeRequest) (empty, error) {
	if err := checkIDs(req.NetworkID, req.EndpointID); err != nil {
		return empty{}, err
	}
	return empty{}, gone(d.driver.Unpublish(context.WithoutCancel(ctx), req.NetworkID, req.EndpointID))
}

// gone makes success of the absence of what was to be taken away. Taking away also does not stop half way because Docker
// has hung up: the calls above take the request's cancellation out of its context.
func gone(err error) error {
	if errors.Is(err, usernet.ErrNotFound) {
		return nil
	}
	return err
}
