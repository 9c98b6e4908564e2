package vcsim

import (
	"maps"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// A method is one SOAP method that is offered.
type method struct {
	// anyone may call it without a session.
	anyone bool
	// needs returns the privileges; nil: being signed in is enough.
	needs func(*call) []demand
	// do is the implementation; nil: the simulator's.
	do func(*call) soap.HasFault
}

// soapMethods are all that is offered, with the privileges that the vSphere
// Web Services API Reference names. What it says needs System.View or
// System.Read is checked where the objects are read (Server.read).
func soapMethods() map[string]method {
	all := map[string]method{
		"RetrieveServiceContent": {anyone: true},
		"CurrentTime":            {},

		"Login":            {anyone: true, do: (*call).login},
		"Logout":           {do: (*call).logout},
		"SessionIsActive":  {needs: atRoot("Sessions.ValidateSession")},
		"TerminateSession": {needs: atRoot("Sessions.TerminateSession"), do: (*call).terminate},

		"CreateFilter":                 {},
		"CreatePropertyCollector":      {},
		"DestroyPropertyCollector":     {},
		"DestroyPropertyFilter":        {},
		"WaitForUpdatesEx":             {},
		"WaitForUpdates":               {},
		"CheckForUpdates":              {},
		"CancelWaitForUpdates":         {},
		"RetrievePropertiesEx":         {anyone: true},
		"RetrieveProperties":           {anyone: true},
		"ContinueRetrievePropertiesEx": {},
		"CancelRetrievePropertiesEx":   {},

		"CreateContainerView": {},
		"CreateListView":      {},
		"ModifyListView":      {},
		"ResetListView":       {},
		"DestroyView":         {},

		"FindByUuid":          {do: (*call).findByUUID},
		"FindAllByUuid":       {do: (*call).findAllByUUID},
		"FindByInventoryPath": {do: (*call).findByPath},
		"FindChild":           {do: (*call).findChild},
		"FindByIp":            {do: (*call).findByIP},
		"FindAllByIp":         {do: (*call).findAllByIP},

		"RetrieveUserGroups": {do: (*call).userGroups},
		"QueryOptions":       {needs: atRoot(privRead)},

		"RetrieveEntityPermissions":    {do: (*call).entityPermissions},
		"RetrieveAllPermissions":       {needs: atRoot(privView), do: (*call).allPermissions},
		"RetrieveRolePermissions":      {needs: atRoot(privView), do: (*call).rolePermissions},
		"SetEntityPermissions":         {needs: onEntity("Authorization.ModifyPermissions"), do: (*call).setPermissions},
		"ResetEntityPermissions":       {needs: onEntity("Authorization.ModifyPermissions"), do: (*call).resetPermissions},
		"RemoveEntityPermission":       {needs: onEntity("Authorization.ModifyPermissions"), do: (*call).removePermission},
		"AddAuthorizationRole":         {needs: atRoot("Authorization.ModifyRoles"), do: (*call).addRole},
		"UpdateAuthorizationRole":      {needs: atRoot("Authorization.ModifyRoles"), do: (*call).updateRole},
		"RemoveAuthorizationRole":      {needs: atRoot("Authorization.ModifyRoles"), do: (*call).removeRole},
		"HasPrivilegeOnEntity":         {do: (*call).hasPrivilege},
		"HasPrivilegeOnEntities":       {do: (*call).hasPrivileges},
		"HasUserPrivilegeOnEntities":   {do: (*call).hasUserPrivileges},
		"FetchUserPrivilegeOnEntities": {do: (*call).fetchPrivileges},

		"AddCustomFieldDef":    {needs: atRoot("Global.ManageCustomFields"), do: (*call).addField},
		"RemoveCustomFieldDef": {needs: atRoot("Global.ManageCustomFields"), do: (*call).removeField},
		"RenameCustomFieldDef": {needs: atRoot("Global.ManageCustomFields"), do: (*call).renameField},
		"SetField":             {needs: onEntity("Global.SetCustomField"), do: (*call).setField},
		"setCustomValue":       {needs: onThis("Global.SetCustomField"), do: (*call).setCustomValue},

		"PostEvent":                {needs: eventNeeds, do: (*call).postEvent},
		"LogUserEvent":             {needs: onEntity("Global.LogEvent"), do: (*call).logUserEvent},
		"QueryEvents":              {needs: atRoot(privView), do: (*call).serial},
		"CreateCollectorForEvents": {needs: atRoot(privView), do: (*call).serial},
		"CreateCollectorForTasks":  {needs: atRoot(privView), do: (*call).serial},
		"ReadNextEvents":           {},
		"ReadPreviousEvents":       {},
		"ReadNextTasks":            {},
		"ReadPreviousTasks":        {},
		"RewindCollector":          {},
		"ResetCollector":           {},
		"SetCollectorPageSize":     {do: (*call).serial},
		"DestroyCollector":         {},

		"CreateResourcePool":        {needs: onThis("Resource.CreatePool"), do: (*call).createPool},
		"UpdateConfig":              {needs: updateConfigNeeds, do: (*call).updatePool},
		"MoveIntoResourcePool":      {needs: movePoolNeeds, do: (*call).movePools},
		"DestroyChildren":           {needs: onThis("Resource.DeletePool"), do: (*call).destroyChildren},
		"CreateFolder":              {needs: onThis("Folder.Create"), do: (*call).createFolder},
		"MoveIntoFolder_Task":       {needs: moveFolderNeeds, do: (*call).moveIntoFolder},
		"Rename_Task":               {needs: renameNeeds, do: (*call).rename},
		"Destroy_Task":              {needs: destroyNeeds, do: (*call).destroy},
		"UnregisterAndDestroy_Task": {needs: destroyNeeds, do: (*call).destroy},

		"PowerOnVM_Task":  {needs: onThis("VirtualMachine.Interact.PowerOn"), do: power(PowerOn)},
		"PowerOffVM_Task": {needs: onThis("VirtualMachine.Interact.PowerOff"), do: power(PowerOff)},
		"ResetVM_Task":    {needs: onThis("VirtualMachine.Interact.Reset"), do: power(PowerReset)},
		"SuspendVM_Task":  {needs: onThis("VirtualMachine.Interact.Suspend"), do: power(PowerSuspend)},
		"ShutdownGuest":   {needs: onThis("VirtualMachine.Interact.PowerOff"), do: power(GuestShutdown)},
		"RebootGuest":     {needs: onThis("VirtualMachine.Interact.Reset"), do: power(GuestReboot)},
		"StandbyGuest":    {needs: onThis("VirtualMachine.Interact.Suspend"), do: power(GuestStandby)},
		"UnregisterVM":    {needs: onThis("VirtualMachine.Inventory.Unregister"), do: (*call).refuseVM},
		"RelocateVM_Task": {needs: onThis("Resource.ColdMigrate"), do: (*call).refuseVM},
		"CloneVM_Task":    {needs: onThis("VirtualMachine.Provisioning.Clone"), do: (*call).refuseVM},
		"CreateVM_Task":   {needs: onThis("VirtualMachine.Inventory.Create"), do: (*call).refuseVM},

		"PbmRetrieveServiceContent": {anyone: true},
		"PbmQueryProfile":           {needs: atRoot("StorageProfile.View")},
		"PbmRetrieveContent":        {needs: atRoot("StorageProfile.View")},
		"PbmFetchResourceType":      {needs: atRoot("StorageProfile.View")},
		"PbmCheckCompatibility":     {needs: atRoot("StorageProfile.View")},
		"PbmQueryMatchingHub":       {needs: atRoot("StorageProfile.View")},
		"PbmCheckRequirements":      {needs: atRoot("StorageProfile.View")},
		"PbmCreate":                 {needs: atRoot("StorageProfile.Update")},
		"PbmUpdate":                 {needs: atRoot("StorageProfile.Update")},
		"PbmDelete":                 {needs: atRoot("StorageProfile.Update")},
		"PbmCheckCompliance":        {needs: atRoot("StorageProfile.View")},
		"PbmFetchComplianceResult":  {needs: atRoot("StorageProfile.View")},
		"PbmQueryAssociatedEntity":  {needs: atRoot("StorageProfile.View")},
		"PbmQueryAssociatedProfile": {needs: atRoot("StorageProfile.View")},
	}
	maps.Copy(all, diskMethods())
	maps.Copy(all, cnsMethods())
	return all
}

func atRoot(privilege string) func(*call) []demand {
	return func(c *call) []demand { return []demand{{privilege, c.s.root}} }
}

func onThis(privilege string) func(*call) []demand {
	return func(c *call) []demand { return []demand{{privilege, c.this}} }
}

// onEntity is for methods of managers whose argument names the object.
func onEntity(privilege string) func(*call) []demand {
	return func(c *call) []demand {
		switch r := c.body.(type) {
		case *types.SetEntityPermissions:
			return c.withParent(privilege, r.Entity)
		case *types.ResetEntityPermissions:
			return c.withParent(privilege, r.Entity)
		case *types.RemoveEntityPermission:
			return c.withParent(privilege, r.Entity)
		case *types.SetField:
			return []demand{{privilege, r.Entity}}
		case *types.LogUserEvent:
			return []demand{{privilege, r.Entity}}
		}
		return []demand{{privilege, c.s.root}}
	}
}

// withParent is for what vSphere wants granted on the object and its parent.
func (c *call) withParent(privilege string, on types.ManagedObjectReference) []demand {
	demands := []demand{{privilege, on}}
	if parent := c.s.parent(on); parent.Value != "" {
		demands = append(demands, demand{privilege, parent})
	}
	return demands
}

// login signs in under the name that a vCenter gives the session.
func (c *call) login() soap.HasFault {
	c.s.beforeLogin()
	r := c.body.(*types.Login)
	who, err := c.s.users.Authenticate(r.UserName, r.Password)
	if err == nil {
		r.UserName = c.s.principal(who.Name)
	}
	// It posts an event.
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	return c.s.vim.SessionManager().Login(c.ctx, r)
}

func (c *call) logout() soap.HasFault {
	c.s.hub.removeSession(c.ctx.Session.Key)
	c.s.endSession(c.ctx.Session.Key)
	return &methods.LogoutBody{Res: &types.LogoutResponse{}}
}

func (c *call) terminate() soap.HasFault {
	r := c.body.(*types.TerminateSession)
	for _, id := range r.SessionId {
		if id == c.ctx.Session.Key {
			return &methods.TerminateSessionBody{Fault_: simulator.Fault("", &types.InvalidArgument{InvalidProperty: "sessionId"})}
		}
		if !c.s.sessions.has(id) {
			return &methods.TerminateSessionBody{Fault_: simulator.Fault("", &types.NotFound{})}
		}
	}
	for _, id := range r.SessionId {
		c.s.endSession(id)
	}
	return &methods.TerminateSessionBody{Res: &types.TerminateSessionResponse{}}
}
