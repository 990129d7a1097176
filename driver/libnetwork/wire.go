package libnetwork

import (
	"encoding/json"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/docker/go-plugins-helpers/sdk"
)

// contentType is the type of every answer. Docker does not look at it.
const contentType = sdk.DefaultContentTypeV1_1

// The messages of the protocol as of Docker 29 (moby/moby, daemon/libnetwork/drivers/remote/api). Those that
// go-plugins-helpers has whole are its own; older engines leave fields out, newer ones may send more than is here.
type (
	DeleteNetworkRequest   = network.DeleteNetworkRequest
	FreeNetworkRequest     = network.FreeNetworkRequest
	AllocateRequest        = network.AllocateNetworkRequest
	AllocateResponse       = network.AllocateNetworkResponse
	EndpointInterface      = network.EndpointInterface
	CreateEndpointResponse = network.CreateEndpointResponse
	DeleteEndpointRequest  = network.DeleteEndpointRequest
	InfoRequest            = network.InfoRequest
	LeaveRequest           = network.LeaveRequest
	RevokeRequest          = network.RevokeExternalConnectivityRequest
	Discovery              = network.DiscoveryNotification
	ErrorResponse          = network.ErrorResponse
)

// Options are the named values that come with a request. Each is decoded when its name is known.
type Options map[string]json.RawMessage

// Manifest answers Plugin.Activate.
type Manifest struct {
	Implements []string
}

// Capabilities answers NetworkDriver.GetCapabilities.
type Capabilities struct {
	Scope             string // local or global
	ConnectivityScope string
	GwAllocChecker    bool // GwAllocCheck may be called (28.0)
}

// GwAllocCheckRequest carries the options of a network before CreateNetwork does.
type GwAllocCheckRequest struct {
	Options Options
}

// GwAllocCheckResponse says for which families the engine need not set an address aside for the gateway.
type GwAllocCheckResponse struct {
	SkipIPv4 bool
	SkipIPv6 bool
}

// CreateNetworkRequest asks for a network.
type CreateNetworkRequest struct {
	NetworkID string
	Options   Options
	IPv4Data  []IPAMData
	IPv6Data  []IPAMData
}

// IPAMData is one subnet as the engine's IPAM driver gave it. Gateway and AuxAddresses are in CIDR notation; what has no
// address may be "", missing or "<nil>".
type IPAMData struct {
	AddressSpace string
	Pool         string
	Gateway      string            `json:",omitempty"`
	AuxAddresses map[string]string `json:",omitempty"`
}

// CreateEndpointRequest asks for an endpoint. Interface says what the engine has chosen already.
type CreateEndpointRequest struct {
	NetworkID  string
	EndpointID string
	Interface  *EndpointInterface
	Options    Options
}

// InfoResponse answers EndpointOperInfo.
type InfoResponse struct {
	Value map[string]any
}

// JoinRequest tells that a container joins. SandboxKey is the path of its network namespace, which need not exist yet.
type JoinRequest struct {
	NetworkID  string
	EndpointID string
	SandboxKey string
	Options    Options
}

// JoinResponse says how the container is to be connected.
type JoinResponse struct {
	InterfaceName         *InterfaceName
	Gateway               string
	GatewayIPv6           string
	StaticRoutes          []StaticRoute
	DisableGatewayService bool
}

// InterfaceName is the link to move into the container and what to call it there.
type InterfaceName struct {
	SrcName   string
	DstName   string // Docker 29 and before do not obey it (moby/moby#52866)
	DstPrefix string
}

// StaticRoute is a route of the container.
type StaticRoute struct {
	Destination string // CIDR; Docker 28 and later dereference a null pointer when it is empty
	RouteType   int    // 0: through NextHop, 1: on the link
	NextHop     string
}

// ConnectivityRequest is what ProgramExternalConnectivity carries.
type ConnectivityRequest struct {
	NetworkID  string
	EndpointID string
	Options    Options
}

// PortBinding is one element of the option com.docker.network.portmap.
type PortBinding struct {
	Proto       uint8  // IANA's protocol number
	IP          string // the container's address; unused
	Port        uint16 // the container's port
	HostIP      string
	HostPort    uint16
	HostPortEnd uint16
}

// empty is a message without fields.
type empty struct{}
